"""The data sets by name, each as a training and a test set of (image, class) pairs.

Small images leave here as float tensors (channels, size, size) in [-1, 1], enlarged or repeated to
the channels that a network asks for, photographs as `photographs.py` says; the order in which they
are drawn is that of `loader.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

from ghl.recipes.errors import check_choice
from ghl.recipes.fashion import FashionMNIST
from ghl.recipes.photographs import Fake, Photographs, image_files

Pairs = Dataset[tuple[Any, int]]


@dataclass(frozen=True)
class Source:
    """A data set before it is read: its images' channels and size, and how to load a split.

    `load(root, train, transform, download)` reads one split; of `photographs` it gives the files.
    """

    load: Callable[[str, bool, Any, bool], Any]
    channels: int
    size: int
    photographs: bool = False


@dataclass(frozen=True)
class Data:
    """A training and a test set, and the shape of what they hold.

    `whole` tells the data from others: its training images without a limit, its classes, and which
    photograph has which number.
    """

    train: Pairs
    test: Pairs
    channels: int
    size: int
    classes: int
    whole: dict[str, Any]


class Digits(torchvision.datasets.VisionDataset):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, in a fixed stratified split (4 : 1)."""

    def __init__(self, train: bool, transform: Any) -> None:
        super().__init__("", transform=transform)
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        split = train_test_split(
            images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
        )
        self.images, self.targets = split[0 if train else 1], split[2 if train else 3]
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.targets[index])


def _digits(root: str, train: bool, transform: Any, download: bool) -> Digits:
    return Digits(train, transform)


def _fashion(root: str, train: bool, transform: Any, download: bool) -> FashionMNIST:
    return FashionMNIST(root, train, transform, download)


def _cifar(cls: Any, root: str, train: bool, transform: Any, download: bool) -> Any:
    try:
        return cls(root, train=train, transform=transform, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"--root {root}: expected an intact {cls.base_folder} in it"
            f" (--download fetches it; torchvision says: {error})"
        ) from error


def _cifar10(root: str, train: bool, transform: Any, download: bool) -> Any:
    return _cifar(torchvision.datasets.CIFAR10, root, train, transform, download)


def _cifar100(root: str, train: bool, transform: Any, download: bool) -> Any:
    return _cifar(torchvision.datasets.CIFAR100, root, train, transform, download)


def _image_files(root: str, train: bool, transform: Any, download: bool) -> Any:
    return image_files(root, train)


def _fake(root: str, train: bool, transform: Any, download: bool) -> Fake:
    return Fake(train)


SOURCES: dict[str, Source] = {
    "digits": Source(_digits, channels=1, size=8),
    "fashion-mnist": Source(_fashion, channels=1, size=28),
    "cifar10": Source(_cifar10, channels=3, size=32),
    "cifar100": Source(_cifar100, channels=3, size=32),
    "imagefolder": Source(_image_files, channels=3, size=224, photographs=True),
    "imagenet": Source(_image_files, channels=3, size=224, photographs=True),
    "fake": Source(_fake, channels=3, size=224, photographs=True),
}
ROOTLESS = ("digits", "fake")
DOWNLOADABLE = ("fashion-mnist", "cifar10", "cifar100")
LIMIT_SEED = 0


def source(name: str) -> Source:
    """The data set of that name; ValueError with the nearest name if there is none."""
    check_choice("data", name, SOURCES)
    return SOURCES[name]


def transform(origin: Source, channels: int, size: int) -> v2.Compose:
    """What turns an image of `origin` into the tensor (channels, size, size) in [-1, 1]."""
    steps: list[Any] = [v2.ToImage()]
    if channels != origin.channels:
        steps.append(v2.Grayscale(1) if channels == 1 else v2.RGB())
    if size != origin.size:
        steps.append(v2.Resize((size, size), antialias=True))
    steps.append(v2.ToDtype(torch.float32, scale=True))
    steps.append(v2.Normalize([0.5] * channels, [0.5] * channels))
    return v2.Compose(steps)


def limited(pairs: Any, limit: int | None) -> Pairs:
    """A fixed random subset of at most `limit` pairs, the same for every seed of a run."""
    if limit is None or limit >= len(pairs):
        return pairs
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(LIMIT_SEED))
    return Subset(pairs, order[:limit].tolist())


def photographs(pairs: Any) -> Photographs | None:
    """The photographs behind a data set that `load` gave; None if it holds small images."""
    whole = pairs.dataset if isinstance(pairs, Subset) else pairs
    return whole if isinstance(whole, Photographs) else None


def load(
    name: str,
    *,
    root: str | None,
    channels: int | None,
    size: int,
    download: bool = False,
    limit_train: int | None = None,
    limit_test: int | None = None,
    seed: int = 0,
) -> Data:
    """Read a data set for a network that takes (channels, size, size) images.

    `channels` None keeps those of the data; `seed` decides how photographs are cropped.
    FileNotFoundError or ValueError names what is missing or damaged.
    """
    origin = source(name)
    _check_root(name, root, download)
    channels = origin.channels if channels is None else channels
    change = None if origin.photographs else transform(origin, channels, size)
    splits = [origin.load(root or "", train, change, download) for train in (True, False)]
    if origin.photographs:
        splits = [
            Photographs(files, train=train, size=size, seed=seed)
            for files, train in zip(splits, (True, False), strict=True)
        ]
    # The last classes may have no test image in shards, which do not list their classes.
    if splits[1].classes != splits[0].classes[: len(splits[1].classes)]:
        raise ValueError(f"--root {root}: expected the same classes in both splits")
    return Data(
        train=limited(splits[0], limit_train),
        test=limited(splits[1], limit_test),
        channels=channels,
        size=size,
        classes=len(splits[0].classes),
        whole={
            "images": len(splits[0]),
            "classes": list(splits[0].classes),
            "numbering": splits[0].files.numbering() if origin.photographs else None,
        },
    )


def check_same(root: str | None, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a ValueError unless the data is what it was, by the `whole` of both."""
    if before == now:
        return
    expected, found = (f"{w['images']} of {len(w['classes'])} classes" for w in (before, now))
    differ = sorted(set(before["classes"]) ^ set(now["classes"]))
    named = f"; not in both: {', '.join(differ[:3])}" if differ else ""
    if expected == found and not differ:
        named = " of other names, or in another order"
    raise ValueError(
        f"--root {root}: expected the run's training images, {expected}, found {found}{named}"
    )


def _check_root(name: str, root: str | None, download: bool) -> None:
    if download and name not in DOWNLOADABLE:
        raise ValueError(f"--download: expected one of {', '.join(DOWNLOADABLE)}, not {name}")
    if name in ROOTLESS:
        return
    if root is None:
        raise ValueError(f"--root: expected the directory that holds {name}, none was given")
    if not download and not Path(root).is_dir():
        raise FileNotFoundError(f"--root {root}: expected a directory that holds {name}")
