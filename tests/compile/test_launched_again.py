"""What csrc/launches and csrc/replay launch gives a driver what Triton's own launches give it, and
is refused where it must be; with a libcuda that has no GPU (`libcuda.cpp`)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compile_cases import OTHERS, WGRAD
from test_compiled_kernels import HERE, environment_with

from ghl_kernels.tapes import launches, player

compiler = shutil.which("c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(not compiler, reason="no C++ compiler for a libcuda without a GPU"),
    pytest.mark.skipif(launches.compiled() is None, reason="the library of launches is not built"),
    pytest.mark.skipif(player.module() is None, reason="csrc/replay is not built for this torch"),
]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What launch_kernels.py prints."""
    directory = tmp_path_factory.mktemp("libcuda")
    build(directory)
    environment = environment_with(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(HERE / "launch_kernels.py"), str(directory)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def build(directory: Path) -> None:
    library = directory / "libcuda.so.1"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, str(HERE / "libcuda.cpp"), "-o", str(library)], check=True)
    (directory / "libcuda.so").symlink_to(library.name)


def test_every_kernel_is_launched_as_triton_launches_it(lines: list[dict[str, Any]]) -> None:
    """Grid, threads, shared memory, stream, and every parameter by its size in the machine code."""
    played = [line for line in lines if "kernel" in line]
    assert all(line["planned"] and line["launches"] == 4 and line["same"] for line in played)
    on_their_own = {name for name in OTHERS if not name.startswith("foreach")}
    assert {line["kernel"] for line in played} == {*WGRAD, *on_their_own}
    assert {line["maps"] for line in played} == {0, 3}


def test_what_is_refused(lines: list[dict[str, Any]]) -> None:
    refused = lines[-1]["refusals"]
    assert refused.pop("made") is True
    assert "seven" in refused.pop("an error of the driver")
    assert set(refused.values()) == {False}


def test_triton_launches_where_somebody_is_told(lines: list[dict[str, Any]]) -> None:
    last = lines[-1]
    assert last["told"] == last["kernels of that call"] > 0


def test_csrc_replay_leaves_to_triton_what_it_cannot_launch(lines: list[dict[str, Any]]) -> None:
    """Of five merges, the fourth without a context: launches, and whether it played them."""
    assert lines[-1]["merges"] == [[2, 0], [2, 0], [2, 1], [2, 0], [2, 1]]
