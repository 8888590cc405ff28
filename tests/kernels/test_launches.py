"""Where the library of launches is not for us, Triton launches. What it launches: tests/compile."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ghl_kernels import library
from ghl_kernels.tapes import launches, player
from ghl_kernels.tapes.launches import ADDRESS, Address, Described, Kernel, TensorMap

NAME = "libghl_kernels_launches.so"
KERNEL = Kernel(1, (1, 1, 1), 32, 0, (ADDRESS, "i"), None, lambda: False)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    launches.compiled.cache_clear()
    yield
    launches.compiled.cache_clear()


def test_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "DIRECTORY", tmp_path)
    assert launches.planned(KERNEL, (Address(0, 0), 3)) is None


def test_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = library.DIRECTORY / NAME
    if not path.exists():
        pytest.skip("the library of launches is not built")
    (tmp_path / NAME).write_bytes(path.read_bytes()[:5000])
    monkeypatch.setattr(library, "DIRECTORY", tmp_path)
    assert launches.planned(KERNEL, (Address(0, 0), 3)) is None


def test_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    assert launches.planned(KERNEL, (Address(0, 0), 3)) is None


def test_too_many_parameters() -> None:
    if launches.compiled() is None:
        pytest.skip("the library of launches is not built")
    kernel = Kernel(1, (1, 1, 1), 32, 0, ("q",) * 600, None, lambda: False)
    assert launches.planned(kernel, range(600)) is None


def test_a_parameter_is_laid_out_as_in_c() -> None:
    """Sizes and alignments of GhlParameter and GhlLaunch in launches.cpp, by hand."""
    assert ctypes.sizeof(launches.Parameter) == 8 + 8 + 4 + 8 + 16 + 4 + 40 + 40 + 20 + 4
    assert ctypes.sizeof(launches.Plan) == 8 + 12 + 4 + 4 + 4


def test_built_wherever_the_cpu_library_is() -> None:
    """Or the tests of what it launches would skip, and nobody notice."""
    cpu = library.serving("cpu")
    if cpu is None or not cpu.loaded:
        pytest.skip("nothing is compiled here")
    assert launches.compiled() is not None


def test_csrc_replay_is_built_wherever_introspection_is() -> None:
    """Each for one Python; and of this torch, or all its tests would skip."""
    built = library.introspection()
    if built is None or player.release(built.torch_headers) != player.release(torch.__version__):
        pytest.skip("nothing is compiled here for this torch")
    assert player.by_whom() == "csrc/replay", "of other sources: make install"


@pytest.mark.parametrize("what", ["a number beyond its dtype", "six dimensions"])
def test_what_cannot_be_laid_out_is_left_to_triton(what: str) -> None:
    six = (1,) * 6
    kinds, value = {
        "a number beyond its dtype": (("i",), 2**31),
        "six dimensions": (
            (TensorMap(9, 2, 0, six),),
            Described(Address(0, 0), six, six, nan_outside=False),
        ),
    }[what]
    kernel = Kernel(1, (1, 1, 1), 32, 0, kinds, None, lambda: False)
    assert launches.planned(kernel, (value,)) is None
