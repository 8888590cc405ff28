"""What the tests of the compiled CUDA kernels share: the whole seam on the host.

`emulated` is csrc/cuda/library.cpp with the kernels run by csrc/cuda/emulation.h, as a library
whose operators take tensors on a CPU. It needs no GPU, and of nvcc only the headers beside it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # cases, and checks of results

from ghl_kernels import dispatch, library, splits
from ghl_kernels.cuda import kernels
from ghl_kernels.library import Library
from ghl_kernels.problem import Problem
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import Table, Tile

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "emulated"


def run(*command: object) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    """The library, registered with torch; built if it is not, in a minute or two."""
    pybind11 = pytest.importorskip("pybind11")
    missing = [tool for tool in ("cmake", "ninja", "c++", "nvcc") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found")
    options = {
        "GHL_TORCH_DIR": Path(torch.__file__).parent,
        "GHL_BUILD_TESTS": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    run("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *definitions)
    run("cmake", "--build", BUILD, "--target", "ghl_emulated")
    path = BUILD / "tests" / "csrc" / "libghl_emulated.so"
    assert library.register(ctypes.CDLL(str(path))) is None
    return path


def three_splits(problem: Problem, tile: Tile, device: object) -> tuple[int, int]:
    """As many as there are blocks, up to three."""
    blocks = -(-problem.rows // tile.block_m)
    rows = -(-blocks // 3) * tile.block_m
    return -(-problem.rows // rows), rows


@pytest.fixture
def emulated(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes `cuda` an implementation for tensors on a CPU, with three splits of the rows."""
    monkeypatch.setitem(library._serving, "cuda", Library(emulated_library, None))
    monkeypatch.setattr(dispatch, "cuda_unavailable", lambda *arguments: None)
    monkeypatch.setattr(tiles, "table", lambda device: Table("none", None, ()))
    monkeypatch.setattr(tiles, "nearest", tiles.nearest.__wrapped__)
    monkeypatch.setattr(kernels, "remembered", kernels.remembered.__wrapped__)
    monkeypatch.setattr(splits, "split_rows", three_splits)
    kernels.compiled_tiles.cache_clear()
    with dispatch.force("cuda"):
        yield
    kernels.compiled_tiles.cache_clear()


@pytest.fixture(autouse=True)
def always_exact_float32(exact_float32: None) -> None:
    """Every test here is of kernels for a GPU, which would take TF32."""
