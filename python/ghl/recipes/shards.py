"""Images in WebDataset tar shards, read at random: one pass over the headers finds every image.

What is done with an image's bytes is in `photographs.py`.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".ppm")
SPLITS = {True: ("train", "training"), False: ("val", "valid", "validation", "test")}


def find_shards(root: Path, *, train: bool) -> list[Path]:
    """A split's shards: `root/train/*.tar`, or those in `root` with the word train in their names.

    They are in order of their names; none if the directory of the split holds something else, of
    which a tar file beside it is the archive. ValueError if a name has words of both splits.
    """
    folders = [root / name for name in SPLITS[train] if (root / name).is_dir()]
    for folder in folders:
        if shards := sorted(folder.glob("*.tar")):
            return shards
    beside = [] if folders else sorted(root.glob("*.tar"))
    return [path for path in beside if split_words(path).intersection(SPLITS[train])]


def split_words(path: Path) -> set[str]:
    """The words of a shard's name that name a split: none in `pretrain-retrieval0.tar`."""
    words = set(re.findall("[A-Za-z]+", path.stem))
    train, test = (words.intersection(names) for names in SPLITS.values())
    if train and test:
        raise ValueError(
            f"shard {path}: expected the name of one split in its name, found"
            f" {' and '.join([*train, *test])}"
        )
    return train | test


class Shards:
    """Encoded images and classes of uncompressed tar files, by number.

    A sample is the files that share a name up to its first dot: an image, and its class as text
    (`.cls`) or as "label" in a `.json`. ValueError names a damaged shard or an incomplete sample.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        samples = [(n, *found) for n, path in enumerate(self.paths) for found in index(path)]
        if not samples:
            raise ValueError(f"shard {paths[0]}: expected samples in it, found none")
        # Arrays, not objects: worker processes share them without copying.
        self.shards, self.offsets, self.sizes, self.targets = np.array(samples, np.int64).T.copy()
        self.classes = [str(number) for number in range(int(self.targets.max()) + 1)]

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, number: int) -> tuple[bytes, int]:
        """The encoded image and the class of a sample."""
        with self.paths[self.shards[number]].open("rb") as file:
            file.seek(self.offsets[number])
            return file.read(self.sizes[number]), int(self.targets[number])

    def name(self, number: int) -> str:
        """Where a sample lies: its shard and its name there."""
        path, offset = self.paths[self.shards[number]], self.offsets[number]
        with suppress(tarfile.TarError, OSError), tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.offset_data == offset:
                    return f"{path}:{member.name}"
        return f"{path}, byte {offset}"  # the shard is not what it was when it was indexed

    def numbering(self) -> str:
        """A hash of which image has which number: of shards' names, and of what lies where."""
        digest = hashlib.sha256(b"\0".join(os.fsencode(path.name) for path in self.paths))
        for numbers in (self.shards, self.offsets, self.sizes, self.targets):
            digest.update(numbers)
        return digest.hexdigest()


def index(path: Path) -> Iterator[tuple[int, int, int]]:
    """Offset and size of the image, and the class, of every sample of a shard, in its order."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                key, dot, suffix = file.partition(".")
                if not member.isfile() or not key:
                    continue
                sample = samples.setdefault(f"{folder}/{key}", {})
                note(sample, archive, member, dot + suffix.lower())
            check_end(raw, archive.offset)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"shard {path}: expected an intact, uncompressed tar file ({error})"
        ) from error
    for key, sample in samples.items():
        if "image" not in sample or sample.get("class", -1) < 0:
            raise ValueError(
                f"shard {path}: expected an image and its class (.cls or .json with a label)"
                f" for {key.strip('/')}, found {', '.join(sample) or 'neither'}"
            )
        yield (*sample["image"], sample["class"])


def check_end(raw: BinaryIO, offset: int) -> None:
    """tarfile.ReadError unless zeros, and nothing else, follow an archive's files at `offset`.

    What tarfile takes for the end may be a damaged header, or where the rest was cut off.
    """
    raw.seek(offset)
    if not raw.read(1):
        raise tarfile.ReadError(f"no zeros at its end, byte {offset}: cut off, or never closed")
    raw.seek(offset)
    while block := raw.read(2**20):
        if any(block):
            raise tarfile.ReadError(f"neither a header nor the end at byte {offset}")


def note(
    sample: dict[str, Any], archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str
) -> None:
    """Enter what a file of a shard says about its sample."""
    if suffix in IMAGES:
        sample["image"] = member.offset_data, member.size
    elif suffix in (".cls", ".json"):
        file = archive.extractfile(member)
        assert file is not None
        try:
            value = json.loads(file.read())
            sample["class"] = int(value["label"] if suffix == ".json" else value)
        except (ValueError, KeyError, TypeError):
            if suffix == ".cls":
                sample["class"] = -1
