"""The data sets: splits, layouts, shapes, and what is said of missing and damaged files."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from ghl.recipes.data import load

STEMS = {
    "train-images-idx3-ubyte": ((6, 28, 28), 250),
    "train-labels-idx1-ubyte": ((6,), 9),
    "t10k-images-idx3-ubyte": ((3, 28, 28), 250),
    "t10k-labels-idx1-ubyte": ((3,), 9),
}


def write_fashion(folder: Path, *, compressed: bool) -> None:
    """Four small files in Fashion-MNIST's format."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (shape, largest) in STEMS.items():
        values = np.arange(np.prod(shape)) % (largest + 1)
        idx = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
        idx += values.astype(np.uint8).tobytes()
        if compressed:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(idx))
        else:
            (folder / stem).write_bytes(idx)


def fashion(root: Path, size: int = 28):
    return load("fashion-mnist", root=str(root), channels=None, size=size)


def test_digits_are_split_once_and_stratified():
    data = load("digits", root=None, channels=None, size=8)
    assert (len(data.train), len(data.test), data.classes, data.channels) == (1437, 360, 10, 1)
    counts = np.bincount(data.test.targets)
    assert counts.min() >= 34
    assert counts.max() <= 37
    image, label = data.train[0]
    assert image.shape == (1, 8, 8)
    assert image.min() == -1
    assert image.max() == 1
    assert label == data.train.targets[0]
    again = load("digits", root=None, channels=None, size=8)
    assert np.array_equal(again.train.images, data.train.images)
    train = {image.tobytes() for image in data.train.images}
    assert not train & {image.tobytes() for image in data.test.images}


def test_images_are_enlarged_and_repeated_as_the_network_asks():
    image, _ = load("digits", root=None, channels=3, size=32).train[0]
    assert image.shape == (3, 32, 32)
    assert torch.equal(image[0], image[2])


def test_a_limit_is_a_fixed_subset():
    limits = {"limit_train": 50, "limit_test": 20}
    one = load("digits", root=None, channels=None, size=8, **limits)
    two = load("digits", root=None, channels=None, size=8, **limits)
    assert (len(one.train), len(one.test)) == (50, 20)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one.train, two.train, strict=True))
    assert len({label for _, label in one.train}) > 5


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
def test_fashion_mnist_in_every_layout(tmp_path, layout, compressed):
    write_fashion(tmp_path / layout, compressed=compressed)
    data = fashion(tmp_path)
    assert (len(data.train), len(data.test)) == (6, 3)
    image, label = data.train[1]
    assert label == 1
    expected = (torch.arange(784, 2 * 784) % 251).view(28, 28) / 255 * 2 - 1
    torch.testing.assert_close(image[0], expected.float())


def test_fashion_mnist_as_published(fashion_mnist):
    data = fashion(Path(fashion_mnist))
    assert (len(data.train), len(data.test), data.classes) == (60000, 10000, 10)
    assert np.bincount(data.train.targets).tolist() == [6000] * 10


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, corrupt])
def test_damaged_gzip_is_named(tmp_path, damage):
    write_fashion(tmp_path, compressed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    damage(path)
    with pytest.raises(ValueError, match=rf"{path}: expected an intact gzip"):
        fashion(tmp_path)


@pytest.mark.parametrize(
    ("stem", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", "expected an IDX header"),
        ("train-images-idx3-ubyte", b"<html>not found</html>", "expected an IDX header"),
        ("train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x09" + bytes(8), "expected 9 values"),
        ("train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x05" + bytes(5), "found 5 labels"),
        ("train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x06" + b"\x0a" * 6, "label of 0 to 9"),
    ],
)
def test_damaged_idx_is_named(tmp_path, stem, content, message):
    write_fashion(tmp_path, compressed=False)
    (tmp_path / stem).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / stem}: .*{message}"):
        fashion(tmp_path)


def test_missing_files_are_named(tmp_path):
    write_fashion(tmp_path, compressed=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"--root .*t10k-labels-idx1-ubyte"):
        fashion(tmp_path)


@pytest.mark.parametrize(
    "name", ["fashion-mnist", "cifar10", "cifar100", "imagefolder", "imagenet"]
)
def test_root_is_needed_and_must_hold_the_data(name, tmp_path):
    with pytest.raises(ValueError, match="--root: expected"):
        load(name, root=None, channels=None, size=32)
    with pytest.raises(FileNotFoundError, match=r"--root .*nowhere: expected"):
        load(name, root=str(tmp_path / "nowhere"), channels=None, size=32)
    with pytest.raises(FileNotFoundError, match=f"--root {tmp_path}: expected"):
        load(name, root=str(tmp_path), channels=None, size=32)


def test_cifar10_is_read_in_torchvisions_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for index, name in enumerate(names):
        batch = {"data": np.full((2, 3072), index, np.uint8), "labels": [index, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    data = load("cifar10", root=str(tmp_path), channels=None, size=32)
    assert (len(data.train), len(data.test), data.channels, data.classes) == (10, 2, 3, 10)
    image, label = data.test[0]
    assert label == 5
    assert torch.allclose(image, torch.full((3, 32, 32), 5 / 255 * 2 - 1))
