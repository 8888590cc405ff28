"""The data sets by name, each as a training and a test set of (image, class) pairs.

Images leave here as float tensors (channels, size, size) in [-1, 1], enlarged or repeated to the
channels that a network asks for; the order in which they are drawn is the trainer's.
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

Pairs = Dataset[tuple[torch.Tensor, int]]


@dataclass(frozen=True)
class Source:
    """A data set before it is read: its images' channels and size, and how to load a split.

    `load(root, train, transform, download)` reads one split. Photographs have no common size and
    are cropped; `cropped` says so.
    """

    load: Callable[[str, bool, Any, bool], Any]
    channels: int
    size: int
    cropped: bool = False


@dataclass(frozen=True)
class Data:
    """A training and a test set, and the shape of what they hold."""

    train: Pairs
    test: Pairs
    channels: int
    size: int
    classes: int


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


class DamagedFile(ValueError):
    """A file that was found and cannot be read.

    A worker of a DataLoader passes it on with its traceback in the message, which is dropped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def read_image(path: str) -> Any:
    """The RGB image in a file; DamagedFile if it cannot be decoded."""
    try:
        return torchvision.datasets.folder.default_loader(path)
    except (OSError, SyntaxError) as error:
        raise DamagedFile(f"data file {path}: expected an intact image ({error})") from error


def _image_folder(root: str, train: bool, transform: Any, download: bool) -> Any:
    folder = Path(root) / ("train" if train else "val")
    if not folder.is_dir():
        raise FileNotFoundError(f"--root {root}: expected the directories train and val in it")
    try:
        return torchvision.datasets.ImageFolder(str(folder), transform=transform, loader=read_image)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--root {root}: expected one directory of images per class in {folder} ({error})"
        ) from error


def _imagenet(root: str, train: bool, transform: Any, download: bool) -> Any:
    try:
        return torchvision.datasets.ImageNet(
            root, split="train" if train else "val", transform=transform, loader=read_image
        )
    except (RuntimeError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"--root {root}: expected ImageNet's archives or what torchvision unpacked from them"
            f" (torchvision says: {error})"
        ) from error


SOURCES: dict[str, Source] = {
    "digits": Source(_digits, channels=1, size=8),
    "fashion-mnist": Source(_fashion, channels=1, size=28),
    "cifar10": Source(_cifar10, channels=3, size=32),
    "cifar100": Source(_cifar100, channels=3, size=32),
    "imagefolder": Source(_image_folder, channels=3, size=224, cropped=True),
    "imagenet": Source(_imagenet, channels=3, size=224, cropped=True),
}
DOWNLOADABLE = ("fashion-mnist", "cifar10", "cifar100")
LIMIT_SEED = 0


def source(name: str) -> Source:
    """The data set of that name; ValueError with the nearest name if there is none."""
    check_choice("data", name, SOURCES)
    return SOURCES[name]


def transform(origin: Source, channels: int, size: int, *, train: bool) -> v2.Compose:
    """What turns an image of `origin` into the tensor (channels, size, size) in [-1, 1].

    Training photographs are cropped and mirrored at random; nothing else is augmented.
    """
    steps: list[Any] = [v2.ToImage()]
    if channels != origin.channels:
        steps.append(v2.Grayscale(1) if channels == 1 else v2.RGB())
    if origin.cropped and train:
        steps += [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    elif origin.cropped:
        steps += [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
    elif size != origin.size:
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


def load(
    name: str,
    *,
    root: str | None,
    channels: int | None,
    size: int,
    download: bool = False,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Data:
    """Read a data set for a network that takes (channels, size, size) images.

    `channels` None keeps those of the data. FileNotFoundError or ValueError names what is
    missing or damaged.
    """
    origin = source(name)
    _check_root(name, root, download)
    channels = origin.channels if channels is None else channels
    splits = [
        origin.load(root or "", train, transform(origin, channels, size, train=train), download)
        for train in (True, False)
    ]
    if splits[0].classes != splits[1].classes:
        raise ValueError(f"--root {root}: expected the same classes in both splits")
    return Data(
        train=limited(splits[0], limit_train),
        test=limited(splits[1], limit_test),
        channels=channels,
        size=size,
        classes=len(splits[0].classes),
    )


def _check_root(name: str, root: str | None, download: bool) -> None:
    if download and name not in DOWNLOADABLE:
        raise ValueError(f"--download: expected one of {', '.join(DOWNLOADABLE)}, not {name}")
    if name == "digits":
        return
    if root is None:
        raise ValueError(f"--root: expected the directory that holds {name}, none was given")
    if not download and not Path(root).is_dir():
        raise FileNotFoundError(f"--root {root}: expected a directory that holds {name}")
