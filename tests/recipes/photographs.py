"""Small photographs on disk for the tests: as class directories and as tar shards."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee")


def jpeg(shade: int, width: int = 50, height: int = 40) -> bytes:
    """A picture of one shade of red."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 0, 0)).save(file, "JPEG", quality=95)
    return file.getvalue()


def noise(seed: int, side: int = 40) -> bytes:
    """A picture in which every crop is another."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_folders(root: Path, images: int = 2) -> None:
    """`images` noisy pictures in each of two classes of both splits."""
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                seed = number + 100 * label
                (folder / f"{number:03d}.jpg").write_bytes(noise(seed))


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """A file of that name and content at the end of an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shards(root: Path, images: int = 2, shards: int = 2, label: str = "cls") -> None:
    """The pictures of `write_folders` in the same order, spread over tar files."""
    root.mkdir(exist_ok=True)
    numbers = [(label, number) for label in range(len(CLASSES)) for number in range(images)]
    for split in ("train", "validation"):
        for shard in range(shards):
            part = numbers[shard * len(numbers) // shards : (shard + 1) * len(numbers) // shards]
            with tarfile.open(root / f"set-{split}-{shard:04d}.tar", "w") as archive:
                for target, number in part:
                    key = f"some.folder/{target}_{number}"
                    add(archive, f"{key}.jpg", noise(number + 100 * target))
                    text = str(target) if label == "cls" else f'{{"label": {target}}}'
                    add(archive, f"{key}.{label}", text.encode())
