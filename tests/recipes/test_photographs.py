"""Photographs: their crops, their layouts, what happens to damaged ones, where they are decoded."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from recipes.photographs import add, jpeg, noise, write_folders, write_shards

from ghl.recipes.data import load
from ghl.recipes.distributed import World
from ghl.recipes.loader import Batches, Damage, Order, TooManyDamaged
from ghl.recipes.photographs import (
    Box,
    Damaged,
    Encoded,
    Photographs,
    central_box,
    cropped,
    decode,
    random_box,
)
from ghl.recipes.shards import find_shards


def read(root, size=32, **options):
    return load("imagenet", root=str(root), channels=None, size=size, **options)


def batches(pairs, *, share=0.0, workers=0, batch_size=4, generator=None):
    order = Order(len(pairs), batch_size, generator, World())
    damage = Damage("training", len(pairs), share)
    return Batches(pairs, order, torch.device("cpu"), damage, workers=workers, channels_last=False)


def test_images_leave_as_bytes_of_one_size_and_arrive_as_numbers(tmp_path):
    folder = tmp_path / "train" / "ant"
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
        (tmp_path / split / "ant" / "a.jpg").write_bytes(jpeg(200))
    data = read(tmp_path)
    image, label = data.train[0]
    assert (image.dtype, image.shape, label) == (torch.uint8, (3, 32, 32), 0)
    ((images, classes),) = batches(data.train)
    assert images.dtype == torch.float32
    assert images[0, 0].mean().item() == pytest.approx(200 / 127.5 - 1, abs=0.03)
    assert images[0, 2].mean().item() == pytest.approx(-1, abs=0.03)
    assert classes.tolist() == [0]
    assert folder.is_dir()


def test_random_boxes_cover_what_they_should():
    boxes = [random_box(300, 400, torch.Generator().manual_seed(n)) for n in range(2000)]
    areas = torch.tensor([b.height * b.width / (300 * 400) for b in boxes])
    ratios = torch.tensor([b.width / b.height for b in boxes])
    assert areas.min() > 0.07
    assert 0.9 < areas.max() <= 1
    assert ratios.min() > 0.74
    assert ratios.max() < 1.35
    assert 0.45 < sum(b.mirrored for b in boxes) / 2000 < 0.55
    assert all(b.top + b.height <= 300 and b.left + b.width <= 400 for b in boxes)
    lefts = torch.tensor([b.left / (400 - b.width) for b in boxes if b.width < 300])
    assert lefts.mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_strip_has_no_such_box_and_gives_its_centre():
    assert random_box(4, 400, torch.Generator().manual_seed(0))[:4] == (0, 198, 4, 4)


def test_testing_takes_the_centre():
    assert central_box(256, 356) == Box(16, 66, 224, 224)
    image = torch.randint(0, 256, (3, 256, 356), dtype=torch.uint8)
    assert torch.equal(cropped(image, central_box(256, 356), 224), image[:, 16:240, 66:290])


def test_a_crop_depends_on_seed_epoch_and_number_alone(tmp_path):
    write_folders(tmp_path)
    one, two, other = (read(tmp_path, seed=seed).train for seed in (5, 5, 6))
    torch.manual_seed(1)
    first = one[1][0]
    torch.manual_seed(2)
    assert torch.equal(first, two[1][0])
    assert not torch.equal(first, other[1][0])
    two.begin(1, 32, encoded=False)
    assert not torch.equal(first, two[1][0])
    two.begin(0, 32, encoded=False)
    assert torch.equal(first, two[1][0])


def test_shards_hold_what_folders_hold(tmp_path):
    write_folders(tmp_path / "folders", images=3)
    folders = read(tmp_path / "folders")
    for label in ("cls", "json"):
        write_shards(tmp_path / label, images=3, label=label)
        shards = read(tmp_path / label)
        assert (len(shards.train), len(shards.test), shards.classes) == (6, 6, 2)
        for split in ("train", "test"):
            for one, two in zip(getattr(folders, split), getattr(shards, split), strict=True):
                assert torch.equal(one[0], two[0])
                assert one[1] == two[1]


def test_shards_in_directories_of_their_own(tmp_path):
    write_shards(tmp_path)
    for split, folder in (("train", "train"), ("validation", "val")):
        (tmp_path / folder).mkdir()
        for path in tmp_path.glob(f"*-{split}-*.tar"):
            path.rename(tmp_path / folder / path.name)
    assert len(read(tmp_path).test) == 4


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"),
        ("imagenet-train-000000.tar", "imagenet-val-000000.tar"),
        ("train_000.tar", "val_000.tar"),
        ("train0.tar", "test0.tar"),
        ("training.0.tar", "valid.0.tar"),
        ("train/000.tar", "val/000.tar"),
        ("retrieval-train-0.tar", "retrieval-val-0.tar"),
        ("latest-train-0.tar", "latest-test-0.tar"),
        ("pretrain-train-0.tar", "pretrain-val-0.tar"),
    ],
)
def test_shards_belong_to_the_split_that_a_word_of_their_name_says(tmp_path, train, test):
    for path in (tmp_path / train, tmp_path / test, tmp_path / "trainval-contest.tar"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert find_shards(tmp_path, train=True) == [tmp_path / train]
    assert find_shards(tmp_path, train=False) == [tmp_path / test]


def test_numbering_tells_data_apart_but_not_where_it_lies(tmp_path):
    """A run that goes on must meet the same images in the same order."""
    found = []
    for name, write in (("folders", write_folders), ("shards", write_shards)):
        write(tmp_path / name)
        before = read(tmp_path / name).train.files.numbering()
        (tmp_path / name).rename(tmp_path / f"{name}-elsewhere")
        assert read(tmp_path / f"{name}-elsewhere").train.files.numbering() == before
        found.append(before)
    shard = next(path for path in (tmp_path / "shards-elsewhere").iterdir() if "train" in path.name)
    shard.rename(shard.with_name(f"another-{shard.name}"))
    found.append(read(tmp_path / "shards-elsewhere").train.files.numbering())
    assert len({*found}) == 3


def test_an_archive_beside_what_it_held_is_no_shard(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"of tars, one a class")
    assert find_shards(tmp_path, train=True) == []
    assert read(tmp_path).classes == 2


def test_a_shard_of_both_splits_is_named(tmp_path):
    path = tmp_path / "pre-train-val-0.tar"
    path.touch()
    for train in (True, False):
        with pytest.raises(ValueError, match=f"shard {path}: .* one split .* found train and val"):
            find_shards(tmp_path, train=train)


def test_a_damaged_shard_is_named(tmp_path):
    write_shards(tmp_path)
    path = tmp_path / "set-train-0001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=f"shard {path}: expected an intact, uncompressed tar"):
        read(tmp_path)


NEITHER = "neither a header nor the end at byte {}"


def a_bit_flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (a_bit_flipped, NEITHER),
        (lambda data, at: data[:at] + bytes(512) + data[at + 512 :], NEITHER),
        (lambda data, at: data[: at + 100], NEITHER),
        (lambda data, at: data[:at], "no zeros at its end, byte {}: cut off, or never closed"),
    ],
    ids=["a bit flipped", "zeroed", "cut off within", "cut off before"],
)
def test_a_damaged_header_is_not_the_end_of_a_shard(tmp_path, damaged, reason):
    write_shards(tmp_path)
    path = tmp_path / "set-train-0001.tar"
    with tarfile.open(path) as archive:
        at = archive.getmembers()[2].offset
    path.write_bytes(damaged(path.read_bytes(), at))
    with pytest.raises(ValueError, match=rf"shard {path}: .* \({reason.format(at)}\)"):
        read(tmp_path)


@pytest.mark.parametrize("zeros", [1, 3, 3000])
def test_a_shard_may_end_in_any_number_of_zero_blocks(tmp_path, zeros):
    write_shards(tmp_path)
    path = tmp_path / "set-train-0001.tar"
    with tarfile.open(path) as archive:
        archive.getmembers()
        end = archive.offset
    path.write_bytes(path.read_bytes()[:end] + bytes(512 * zeros))
    assert len(read(tmp_path).train) == 4


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [("x.jpg", b"", "image"), ("x.cls", b"1", "class"), ("x.cls", b"one", "class")],
)
def test_an_incomplete_sample_is_named(tmp_path, name, content, found):
    write_shards(tmp_path)
    path = tmp_path / "set-train-0000.tar"
    with tarfile.open(path, "a") as archive:
        add(archive, name, content)
    with pytest.raises(ValueError, match=rf"shard {path}: .* for x, found {found}"):
        read(tmp_path)


def damage(path):
    path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_left_out_counted_and_named(tmp_path, capsys, workers):
    write_folders(tmp_path, images=5)
    path = tmp_path / "train" / "bee" / "001.jpg"
    damage(path)
    found = batches(read(tmp_path).train, share=0.1, workers=workers)
    for _ in range(2):
        classes = torch.cat([classes for _, classes in found])
        assert classes.tolist() == [0] * 5 + [1] * 4
    assert found.damage.check(World()) == 1
    assert capsys.readouterr().out == f"left out, damaged: {path}\n"


def test_what_cannot_be_opened_is_damaged(tmp_path, capsys):
    write_folders(tmp_path, images=5)
    gone, link = (tmp_path / "train" / "bee" / name for name in ("001.jpg", "link.jpg"))
    link.symlink_to("nowhere.jpg")
    found = batches(read(tmp_path).train, share=0.2)
    gone.unlink()
    assert torch.cat([classes for _, classes in found]).tolist() == [0] * 5 + [1] * 4
    assert capsys.readouterr().out == "".join(f"left out, damaged: {p}\n" for p in (gone, link))


@pytest.mark.parametrize("lost", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_the_images_of_a_shard_that_was_lost_are_damaged(tmp_path, capsys, lost):
    write_shards(tmp_path)
    found = batches(read(tmp_path).train, share=0.5)
    path = tmp_path / "set-train-0001.tar"
    lost(path)
    assert torch.cat([classes for _, classes in found]).tolist() == [0] * 2
    assert capsys.readouterr().out.count(f"left out, damaged: {path}, byte ") == 2


def test_names_that_are_no_text_are_printed(capsys):
    damage = Damage("training", 10, 0.1)
    damage.note([Damaged("\udce9t\udce9.jpg", 3)])
    assert capsys.readouterr().out == "left out, damaged: \\udce9t\\udce9.jpg\n"
    with pytest.raises(TooManyDamaged, match=r"found 2 \(\\udce9t\\udce9.jpg\)"):
        damage.note([Damaged("\udce8.jpg", 5)])


def test_damaged_images_in_shards_are_named(tmp_path, capsys):
    write_shards(tmp_path)
    path = tmp_path / "set-train-0001.tar"
    data = bytearray(path.read_bytes())
    second = data.index(b"1_1.jpg")
    start = second // 512 * 512 + 512
    data[start : start + 300] = bytes(300)
    path.write_bytes(data)
    list(batches(read(tmp_path).train, share=0.25))
    assert f"{path}:some.folder/1_1.jpg" in capsys.readouterr().out


def test_too_many_damaged_images_stop_the_run(tmp_path):
    write_folders(tmp_path, images=5)
    for number in range(2):
        damage(tmp_path / "train" / "ant" / f"00{number}.jpg")
    message = (
        r"--damaged-share 0.1: expected at most that share of the 10 training images to be"
        rf" damaged, found 2 \({tmp_path}/train/ant/00.\.jpg\)"
    )
    with pytest.raises(TooManyDamaged, match=message):
        list(batches(read(tmp_path).train, share=0.1))


def test_a_batch_without_an_intact_image_has_no_class(tmp_path):
    write_folders(tmp_path, images=1)
    damage(tmp_path / "train" / "ant" / "000.jpg")
    (_, none), (_, one) = batches(read(tmp_path).train, share=0.5, batch_size=1)
    assert (none.tolist(), one.tolist()) == ([], [1])


@pytest.fixture
def mixed(tmp_path):
    """Three JPEG files, a PNG, and a JPEG in CMYK, which devices do not decode."""
    write_folders(tmp_path, images=2)
    Image.open(io.BytesIO(noise(7))).save(tmp_path / "train" / "ant" / "001.png")
    (tmp_path / "train" / "ant" / "001.jpg").unlink()
    Image.open(io.BytesIO(noise(8))).convert("CMYK").save(tmp_path / "train" / "bee" / "002.jpg")
    return tmp_path


def test_decoding_on_the_device_gives_what_workers_give(mixed):
    pairs = read(mixed).train
    ((expected, classes),) = batches(pairs, batch_size=8)
    pairs.begin(0, 32, encoded=True)
    kinds = [isinstance(pairs[number][0], Encoded) for number in range(len(pairs))]
    assert kinds == [True, False, True, True, False]
    ((images, same_classes),) = batches(pairs, batch_size=8)
    assert classes.tolist() == same_classes.tolist() == [0, 0, 1, 1, 1]
    # Two JPEG decoders differ by rounding: at most a few of 255 levels.
    torch.testing.assert_close(images, expected, atol=4 / 127.5, rtol=0)


def test_what_the_device_cannot_decode_is_left_out_and_named(mixed, capsys):
    path = mixed / "train" / "bee" / "000.jpg"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\xff\xda")])  # a header without any pixels
    pairs = read(mixed).train
    pairs.begin(0, 32, encoded=True)
    ((images, classes),) = batches(pairs, share=0.2, batch_size=8)
    assert (len(images), classes.tolist()) == (4, [0, 0, 1, 1])
    assert capsys.readouterr().out == f"left out, damaged: {path}\n"


def test_decode_keeps_the_order_around_what_fails():
    files = [jpeg(50), b"\xff\xd8 no jpeg", jpeg(250)]
    encoded = [
        Encoded(torch.frombuffer(bytearray(data), dtype=torch.uint8), Box(0, 0, 40, 50), 8, n)
        for n, data in enumerate(files)
    ]
    one, none, two = decode(encoded, torch.device("cpu"))
    assert none is None
    assert (one[0].float().mean().round(), two[0].float().mean().round()) == (50, 250)


def test_folders_must_agree_on_the_classes(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "wasp")
    with pytest.raises(ValueError, match="the same classes in both splits"):
        read(tmp_path)


def test_classes_without_images_are_named(tmp_path):
    write_folders(tmp_path)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=f"--root {tmp_path}: .* per class in .*val"):
        read(tmp_path)


def test_fake_images_have_imagenets_size():
    data = load("fake", root=None, channels=None, size=64, limit_train=10)
    assert (len(data.train), len(data.test), data.classes) == (10, 50_000, 1000)
    image, label = data.train[3]
    assert (image.dtype, image.shape) == (torch.uint8, (3, 64, 64))
    assert 0 <= label < 1000
    assert torch.equal(image, data.train[3][0])
    assert not torch.equal(image, data.train[4][0])


def test_every_other_error_is_not_a_damaged_image(tmp_path, monkeypatch):
    """A bug must not pass for damage."""
    write_folders(tmp_path)
    pairs = read(tmp_path).train
    assert isinstance(pairs, Photographs)
    monkeypatch.setattr(torchvision.transforms.v2.functional, "pil_to_tensor", lambda image: None)
    with pytest.raises(TypeError):
        assert not isinstance(pairs[0][0], Damaged)
