"""Photographs of no common size as data sets: class directories, tar shards, or made up.

An image is cropped by a box that depends on (seed, epoch, number) and on nothing else, so that an
epoch can be cut anywhere and go on the same; it leaves here as uint8, or still encoded as JPEG.
"""

import hashlib
import io
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from ghl.recipes.shards import SPLITS, Shards, find_shards

MARGIN = 256 / 224  # the side an image is scaled to in testing, over that of its central crop
FAKE_TRAIN, FAKE_TEST, FAKE_SIZE, FAKE_CLASSES = 1_281_167, 50_000, 224, 1000


class Box(NamedTuple):
    """What part of an image is used, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False


class Encoded(NamedTuple):
    """A JPEG file's bytes (uint8, one dimension) that the device is to decode, and its box."""

    data: Tensor
    box: Box
    size: int
    number: int


class Damaged(NamedTuple):
    """The name and number of an image that cannot be read, in place of that image."""

    name: str
    number: int


def central_box(height: int, width: int) -> Box:
    """The centre of an image: what is left of it when the scaled image's margin is cut off."""
    side = max(1, round(min(height, width) / MARGIN))
    return Box((height - side) // 2, (width - side) // 2, side, side)


def random_box(height: int, width: int, generator: torch.Generator) -> Box:
    """8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, mirrored half of the time."""
    draws = torch.rand(41, generator=generator).tolist()
    mirrored = draws.pop() < 0.5
    for area, ratio, y, x in zip(*[iter(draws)] * 4, strict=True):
        target = height * width * (0.08 + 0.92 * area)
        aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
            return Box(top, left, h, w, mirrored)
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side, mirrored)


def cropped(image: Tensor, box: Box, size: int) -> Tensor:
    """The box of a uint8 image (3, H, W), scaled to (3, size, size)."""
    top, left, height, width, mirrored = box
    part = F.resize(image[:, top : top + height, left : left + width], [size, size], antialias=True)
    return part.flip(-1) if mirrored else part


class Folder:
    """Encoded images of one directory per class, by number."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        found = torchvision.datasets.ImageFolder(self.folder)
        self.classes, self.targets = found.classes, found.targets
        self.files = [path for path, _ in found.samples]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, number: int) -> tuple[bytes, int]:
        """The encoded image and its class."""
        return Path(self.files[number]).read_bytes(), self.targets[number]

    def name(self, number: int) -> str:
        """The image's file."""
        return self.files[number]

    def numbering(self) -> str:
        """A hash of which file has which number, wherever the directory is."""
        names = (os.fsencode(file.removeprefix(self.folder)) for file in self.files)
        return hashlib.sha256(b"\0".join(names)).hexdigest()


class Fake:
    """torchvision's FakeData of ImageNet's size: noise that is drawn anew whenever it is read."""

    def __init__(self, train: bool) -> None:
        images, offset = (FAKE_TRAIN, 0) if train else (FAKE_TEST, FAKE_TRAIN)
        shape = (3, FAKE_SIZE, FAKE_SIZE)
        self.data = torchvision.datasets.FakeData(images, shape, FAKE_CLASSES, random_offset=offset)
        self.classes = [str(number) for number in range(FAKE_CLASSES)]

    def __len__(self) -> int:
        return len(self.data)

    def read(self, number: int) -> tuple[Image.Image, int]:
        """The image, which needs no decoding, and its class."""
        image, label = self.data[number]
        return image, int(label)

    def name(self, number: int) -> str:
        """What to call the image."""
        return f"fake image {number}"

    def numbering(self) -> str:
        """There is only one."""
        return "fake"


class Photographs(Dataset):
    """(image, class) of a split, where image is uint8 (3, size, size), Encoded or Damaged.

    What cannot be opened is damaged as what cannot be decoded is, and may have no class (-1).
    `begin` says in which epoch, with which side and decoded where the next images are wanted.
    """

    def __init__(self, files: Folder | Shards | Fake, *, train: bool, size: int, seed: int) -> None:
        self.files = files
        self.classes = files.classes
        self.train = train
        self.seed = seed
        self.begin(0, size, encoded=False)

    def begin(self, epoch: int, size: int, *, encoded: bool) -> None:
        """What holds for the images read from now on."""
        self.epoch, self.size, self.encoded = epoch, size, encoded

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor | Encoded | Damaged, int]:
        try:
            raw, label = self.files.read(number)
        except (FileNotFoundError, PermissionError):  # also of a link to nowhere
            return Damaged(self.files.name(number), number), -1
        try:
            image = Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else raw
            box = self._box(image.height, image.width, number)
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            if self.encoded and plain and isinstance(raw, bytes):
                data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
                return Encoded(data, box, self.size, number), label
            return cropped(F.pil_to_tensor(image.convert("RGB")), box, self.size), label
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return Damaged(self.files.name(number), number), label

    def _box(self, height: int, width: int, number: int) -> Box:
        if not self.train:
            return central_box(height, width)
        key = hash((self.seed, self.epoch, number)) % 2**63
        return random_box(height, width, torch.Generator().manual_seed(key))


def image_files(root: str, train: bool) -> Folder | Shards:
    """A split as shards or class directories; FileNotFoundError or ValueError if it is neither."""
    shards = find_shards(Path(root), train=train)
    if shards:
        return Shards(shards)
    names = SPLITS[train]
    folders = [Path(root) / name for name in names if (Path(root) / name).is_dir()]
    if not folders:
        raise FileNotFoundError(
            f"--root {root}: expected the directories train and val in it, or shards with"
            f" the word {' or '.join(names)} in their names (*.tar)"
        )
    try:
        return Folder(folders[0])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--root {root}: expected one directory of images per class in {folders[0]} ({error})"
        ) from error


def decode(images: list[Encoded], device: torch.device) -> list[Tensor | None]:
    """The images (3, size, size) as uint8 on the device; None in place of those not decodable.

    torchvision decodes by nvJPEG on a GPU and by libjpeg on a CPU.
    """
    mode = torchvision.io.ImageReadMode.RGB
    try:
        whole = torchvision.io.decode_jpeg([i.data.cpu() for i in images], mode, device=device)
    except RuntimeError:
        if len(images) == 1:
            return [None]
        return [image for one in images for image in decode([one], device)]
    return [cropped(image, i.box, i.size) for image, i in zip(whole, images, strict=True)]


def decodes(device: torch.device) -> bool:
    """Whether torchvision can decode on that GPU: a small JPEG is tried."""
    if device.type != "cuda":
        return False
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return decode([Encoded(data, Box(0, 0, 16, 16), 16, 0)], device) != [None]
