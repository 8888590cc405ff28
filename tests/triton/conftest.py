"""What the tests of the Triton kernels share: a device, small tiles, a forced implementation.

Without a GPU everything runs under Triton's interpreter, with a GPU as compiled kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # cases, and checks of results

pytest.importorskip("triton")

from small_tiles import COMPILED, MANY_SPLITS, Form

from ghl_kernels import replay, splits
from ghl_kernels.tuning import tiles


def pytest_configure(config: pytest.Config) -> None:
    """NumPy, under the interpreter, warns of what a kernel computes and does not store."""
    for module in ("triton.runtime.interpreter", "numpy._core.fromnumeric"):
        config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{module}")


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """Where the kernels run, and where tensors are made unless a test says otherwise."""
    if not torch.cuda.is_available():
        yield torch.device("cpu")
        return
    with torch.device("cuda", torch.cuda.current_device()) as device:
        yield device


@pytest.fixture(autouse=True)
def always_exact_float32(exact_float32: None) -> None:
    """Every test here is of kernels for a GPU, which would take TF32."""


@pytest.fixture(params=(*tiles.BY_TRITON, *COMPILED))
def implementation(request: pytest.FixtureRequest, forced: Callable) -> Iterator[str]:
    with forced(request.param):
        yield request.param


@pytest.fixture(params=("triton", *COMPILED))
def fused(request: pytest.FixtureRequest, forced: Callable) -> Iterator[None]:
    """Forces the implementations whose u lives only in tiles, or in registers."""
    with forced(request.param):
        yield


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Form], None]:
    """Has every layer take a form, until the test is over or takes another."""
    return lambda form: form.use(monkeypatch)


@pytest.fixture(autouse=True)
def small_tiles(use: Callable[[Form], None]) -> None:
    """Small tiles and several splits, for tests that do not choose; there is no table for a CPU."""
    use(MANY_SPLITS)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, use: Callable) -> dict:
    """Operators replay their calls here too; the tapes that there are."""
    tapes: dict = {}
    monkeypatch.setattr(replay, "_tapes", tapes)
    monkeypatch.setattr(replay, "on_gpu", lambda t: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    return tapes


OWN = {name: getattr(tiles, name) for name in ("table", "nearest")}
own_split_rows = splits.split_rows  # these before fixtures replace them


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables and the splits that users have."""
    for name, function in OWN.items():
        monkeypatch.setattr(tiles, name, function)
    monkeypatch.setattr(splits, "split_rows", own_split_rows)
