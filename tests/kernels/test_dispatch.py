"""Which implementation runs, why, and what happens when a compiled library is not there."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import Conv, Linear

import ghl_kernels
from ghl_kernels import Backend, Rule, dispatch, library
from ghl_kernels.library import Library
from ghl_kernels.ops import OPERATORS

LINEAR = Linear(4, 3, 5)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> str:
    """A process in which nothing was compiled; the reason it knows."""
    reason = "not built: a test says so"
    monkeypatch.setattr(dispatch, "_libraries", {"cpu": Library(Path("absent.so"), reason)})
    return reason


@pytest.fixture
def some_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which the CPU library is loaded, as far as the dispatcher knows."""
    monkeypatch.setattr(dispatch, "_libraries", {"cpu": Library(Path("present.so"), None)})


@pytest.mark.parametrize("operator", OPERATORS)
def test_native_runs_where_the_library_is_loaded(operator: str, some_library: None) -> None:
    backend = ghl_kernels.backend(operator, torch.zeros(2, 2))
    assert backend == Backend("native", "compiled kernels for cpu are loaded")


@pytest.mark.parametrize("operator", OPERATORS)
def test_composed_runs_where_it_is_not_and_says_why(operator: str, no_library: str) -> None:
    assert ghl_kernels.backend(operator, torch.zeros(2, 2)) == Backend("composed", no_library)


def test_composed_serves_devices_without_kernels(some_library: None) -> None:
    backend = ghl_kernels.backend("merge", torch.zeros(2, 2, device="meta"))
    assert backend == Backend("composed", "there are no native kernels for meta")


def test_everything_works_with_nothing_compiled(no_library: str) -> None:
    tensors = LINEAR.tensors()
    exact = LINEAR.reference([t.double() for t in tensors], "ghl")
    torch.testing.assert_close(LINEAR.update(tensors, Rule())[0].double(), exact.update)
    assert ghl_kernels.last("linear_update") == Backend("composed", no_library)


def test_forcing_what_is_not_there_is_an_error(no_library: str) -> None:
    with (
        ghl_kernels.force("native"),
        pytest.raises(RuntimeError, match=f"native is forced for linear_pair, but {no_library}"),
    ):
        LINEAR.pair(LINEAR.tensors(), Rule())


def test_unknown_names_are_errors() -> None:
    with (
        pytest.raises(ValueError, match=r"name is 'nativ', .*did you mean 'native'"),
        ghl_kernels.force("nativ"),
    ):
        pass
    with pytest.raises(ValueError, match=r"operator is 'conv2d', must be one of logsumexp"):
        ghl_kernels.backend("conv2d", torch.zeros(1))


def test_force_nests_and_ends_with_an_exception(some_library: None) -> None:
    def name() -> str:
        return ghl_kernels.backend("merge", torch.zeros(1)).name

    with ghl_kernels.force("composed"):
        assert ghl_kernels.backend("merge", torch.zeros(1)) == Backend("composed", "forced")
        with ghl_kernels.force("native"):
            assert name() == "native"
        assert name() == "composed"
    with pytest.raises(ZeroDivisionError), ghl_kernels.force("composed"):
        raise ZeroDivisionError
    assert name() == "native"


def test_force_holds_on_the_threads_of_autograd(no_library: str) -> None:
    """backward() runs on threads of its own: a choice kept per thread would not reach them."""
    names = []

    def choose() -> None:
        names.append(ghl_kernels.backend("merge", torch.zeros(1)))

    with ghl_kernels.force("composed"):
        thread = threading.Thread(target=choose)
        thread.start()
        thread.join()
    assert names == [Backend("composed", "forced")]


def test_last_is_what_ran_and_none_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_last", {})
    assert ghl_kernels.last("logsumexp") is None
    with ghl_kernels.force("composed"):
        torch.ops.ghl_kernels.logsumexp(torch.zeros(2, 2), 1.0, 1)
    assert ghl_kernels.last("logsumexp") == Backend("composed", "forced")
    assert ghl_kernels.last("merge") is None


def test_both_implementations_agree(implementation: str) -> None:
    """And the one that is forced is the one whose functions are called."""
    layer = Conv(2, 4, (5, 5), 9, padding=(1, 1))
    tensors = layer.tensors()
    forced = layer.update(tensors, Rule())[0]
    with ghl_kernels.force("composed"):
        torch.testing.assert_close(forced, layer.update(tensors, Rule())[0], rtol=1e-4, atol=1e-5)
    layer.update(tensors, Rule())


def test_an_absent_library_is_a_reason_not_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "DIRECTORY", tmp_path)
    loaded = library.load("ghl_kernels_cpu")
    assert not loaded.loaded
    assert loaded.path == tmp_path / "libghl_kernels_cpu.so"
    assert loaded.reason.startswith("not built")


def test_a_damaged_library_is_a_reason_not_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "DIRECTORY", tmp_path)
    (tmp_path / "libghl_kernels_cpu.so").write_bytes(b"not a library")
    loaded = library.load("ghl_kernels_cpu")
    assert not loaded.loaded
    assert f"does not load into torch {torch.__version__}" in loaded.reason
    assert "\n" not in loaded.reason


def test_the_package_imports_and_learns_with_no_library_beside_it(tmp_path: Path) -> None:
    """A copy of the Python files alone, in a process of its own."""
    source = Path(ghl_kernels.__file__).parent
    package = tmp_path / "ghl_kernels"
    package.mkdir()
    for file in source.glob("*.py"):
        (package / file.name).write_bytes(file.read_bytes())
    program = (
        "import torch, ghl_kernels as k\n"
        "x, y, w = torch.randn(6, 3), torch.randn(6, 4), torch.randn(4, 3)\n"
        "rule = ('softmax', 1.0, 'oja', 'sign', 'absmax')\n"
        "update = torch.ops.ghl_kernels.linear_update(x, y, y, w, *rule)[0]\n"
        "wanted = k.reference.linear_update(x, y, y, w).update\n"
        "torch.testing.assert_close(update, wanted)\n"
        "print(k.__file__, k.last('linear_update'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(package) in done.stdout
    assert "name='composed', reason='not built" in done.stdout
