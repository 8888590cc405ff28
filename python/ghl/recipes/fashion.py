"""Fashion-MNIST from its four IDX files, gzip on or off, in torchvision's layout or bare.

The other data sets are in `data.py`; only this one needs a reader, since torchvision takes
neither compressed nor bare files and does not tell a damaged file.
"""

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

UINT8 = 0x08
RAW = Path("FashionMNIST") / "raw"


def read_idx(path: Path, dims: int) -> Tensor:
    """The uint8 tensor with `dims` dimensions of one IDX file, gzip on or off.

    ValueError naming the file if it is damaged.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"data file {path}: expected an intact gzip file ({error})") from error
    start = 4 + 4 * dims
    if len(data) < start or data[:4] != bytes((0, 0, UINT8, dims)):
        raise ValueError(
            f"data file {path}: expected an IDX header of bytes in {dims} dimensions,"
            f" found {data[:4].hex()}"
        )
    shape = struct.unpack(f">{dims}I", data[4:start])
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:]
    if values.numel() != torch.Size(shape).numel():
        raise ValueError(
            f"data file {path}: expected {torch.Size(shape).numel()} values for its shape"
            f" {shape}, found {values.numel()}"
        )
    return values.view(shape)


def find_file(root: Path, name: str) -> Path:
    """Where an IDX file lies under `root`, gzip on or off; FileNotFoundError if it does not."""
    for folder in (root / RAW, root):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"--root {root}: expected {name} or {name}.gz in it or in its {RAW}"
        " (--download fetches them)"
    )


class FashionMNIST(torchvision.datasets.FashionMNIST):
    """torchvision's data set, reading `root/FashionMNIST/raw` or `root` itself.

    FileNotFoundError names a missing file, ValueError a damaged one.
    """

    def _check_legacy_exist(self) -> bool:
        return False

    def _check_exists(self) -> bool:
        try:
            for file, _ in self.resources:
                find_file(Path(self.root), file.removesuffix(".gz"))
        except FileNotFoundError:
            if not self.downloading:
                raise
            return False
        return True

    def __init__(self, root: str, train: bool, transform: Any, download: bool = False) -> None:
        self.downloading = download
        super().__init__(root, train=train, transform=transform, download=download)

    def _load_data(self) -> tuple[Tensor, Tensor]:
        prefix = "train" if self.train else "t10k"
        images_path = find_file(Path(self.root), f"{prefix}-images-idx3-ubyte")
        labels_path = find_file(Path(self.root), f"{prefix}-labels-idx1-ubyte")
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if images.shape[1:] != (28, 28):
            raise ValueError(
                f"data file {images_path}: expected 28x28 images, found {tuple(images.shape[1:])}"
            )
        if len(labels) != len(images) or not len(labels) or int(labels.max()) > 9:
            raise ValueError(
                f"data file {labels_path}: expected one label of 0 to 9 for each of the"
                f" {len(images)} images in {images_path.name}, found {len(labels)} labels"
            )
        return images, labels.long()
