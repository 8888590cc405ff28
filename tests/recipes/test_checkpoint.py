"""Checkpoints: written all or not at all, and refused when they are not what is expected."""

import errno
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ghl.recipes import checkpoint
from ghl_kernels import files

RULE = {"gate": "sign", "tau": 1.0}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with every field, 200 kB of weights among them."""
    path = tmp_path / "checkpoint.pt"
    state = dict.fromkeys(checkpoint.FIELDS - {"version"})
    state |= {"arch": "deephebb", "rule": RULE, "model": {"weight": torch.rand(50000)}}
    checkpoint.save(path, state)
    return path


def read(path):
    return checkpoint.load(path, arch="deephebb", rule=RULE)


def rewrite(path, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, path)


def test_round_trip(saved):
    state = read(saved)
    assert state["version"] == checkpoint.VERSION
    assert state["rule"] == RULE
    assert state["model"]["weight"].shape == (50000,)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"{saved}: expected an intact checkpoint"):
        read(saved)


def test_flipped_bit_in_the_weights(saved):
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 1
    saved.write_bytes(data)
    with pytest.raises(ValueError, match=r"expected an intact checkpoint \(.*checksum"):
        read(saved)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file"):
        read(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "expected version 3, found 1"),
        ({"arch": "fasthebb"}, "expected arch 'deephebb', found 'fasthebb'"),
        ({"rule": RULE | {"tau": 2.0}}, "expected rule .*'tau': 1.0.*, found .*'tau': 2.0"),
    ],
)
def test_of_another_kind(saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(ValueError, match=message):
        read(saved)


def test_without_a_field(saved):
    state = torch.load(saved, weights_only=True)
    del state["optimizer"]
    torch.save(state, saved)
    with pytest.raises(ValueError, match="expected the fields optimizer"):
        read(saved)


class Payload:
    """What an attacker would put into a pickle."""

    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_it_is_executed(saved, capsys):
    torch.save({"version": 1, "payload": Payload()}, saved)
    with pytest.raises(ValueError, match="expected an intact checkpoint"):
        read(saved)
    assert "executed" not in capsys.readouterr().out


def test_failing_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def write(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(path, write)
    assert path.read_text() == "old"


def test_a_shared_file_is_replaced_by_several_at_once(tmp_path):
    path = tmp_path / "file"

    def write(number):
        for _ in range(20):
            files.write_text(path, str(number) * 4096, shared=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(path.read_text()) == 4096 and len(set(path.read_text())) == 1
    assert [*tmp_path.iterdir()] == [path]


def test_a_full_disk_is_told_as_one_and_keeps_no_half_checkpoint(saved):
    before, state = saved.read_bytes(), read(saved)
    partial = saved.with_name("checkpoint.pt.partial")
    partial.symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        checkpoint.save(saved, state)
    assert raised.value.errno == errno.ENOSPC
    assert saved.read_bytes() == before
    assert not partial.is_symlink()


def test_random_states_come_back():
    order = torch.Generator().manual_seed(5)
    checkpoint.seed_everything(3)
    states = checkpoint.random_states(order)

    def draw():
        return (
            random.random(),
            np.random.rand(),
            torch.rand(1).item(),
            torch.rand(1, generator=order).item(),
        )

    first = draw()
    assert draw() != first
    checkpoint.restore_random_states(states, order)
    assert draw() == first
