"""What every test shares: a seed, poisoned memory, a number of threads, a forced implementation.

Without a GPU the Triton kernels run under Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import ghl_kernels
from ghl_kernels import composed, dispatch, fold, layout, library, merges, native, splits
from ghl_kernels.cuda import kernels
from ghl_kernels.tapes import tape

settings.register_profile(
    "ghl",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("ghl")

ALLOCATING = ("fold", "logsumexp", "patches", "store_u")  # of ghl_kernels.triton


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fill memory that nobody has written yet: with NaN, or with the largest integer."""
    unwritten = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    return t.fill_(unwritten)


class PoisonedTorch(ModuleType):
    """torch, except that memory nobody has written yet is poisoned."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        return poison(torch.empty(*args, **kwargs))

    @staticmethod
    def empty_strided(*args: object, **kwargs: object) -> torch.Tensor:
        return poison(torch.empty_strided(*args, **kwargs))

    @staticmethod
    def empty_like(*args: object, **kwargs: object) -> torch.Tensor:
        return poison(torch.empty_like(*args, **kwargs))


@pytest.fixture(scope="session", autouse=True)
def poisoned_workspace() -> Iterator[None]:
    """Memory that C++ allocates is 0x7f7f… until written: 3e38 in float32, 1e306 in float64."""
    fill = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's only
    perturb = -6
    if fill:
        fill(perturb, 0x80)
    yield
    if fill:
        fill(perturb, 0)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [native, composed, fold, layout, merges, splits, kernels, tape]
    if not dispatch.triton_missing():
        modules += [importlib.import_module(f"ghl_kernels.triton.{name}") for name in ALLOCATING]
    for module in modules:
        monkeypatch.setattr(module, "torch", PoisonedTorch())


@pytest.fixture(autouse=True)
def unsettled() -> Iterator[None]:
    """What the dispatcher remembers of a test's tables and libraries is no other test's."""
    yield
    dispatch.unsettle()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors on a busy machine spend their time waiting for a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads kernels may use, for the duration of a test."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AbstractContextManager[None]]:
    """Forces an implementation and asserts, at the end, that it is the one that ran."""

    @contextlib.contextmanager
    def forced(name: str) -> Iterator[None]:
        ran: dict[str, tuple[ghl_kernels.Backend, int]] = {}
        monkeypatch.setattr(dispatch, "_last", ran)
        with ghl_kernels.force(name):
            yield
        assert {backend.name for backend, _ in ran.values()} <= {name}
        assert ran, "the test reached no operator"

    return forced


@pytest.fixture(params=["native", "composed"])
def implementation(request: pytest.FixtureRequest, forced: Callable) -> Iterator[str]:
    found = library.serving("cpu")
    if request.param == "native" and not (found and found.loaded):
        pytest.skip(f"no native kernels: {found.reason if found else 'no library for cpu'}")
    with forced(request.param):
        yield request.param


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """No TF32 unless a test asks for it: the tolerances are those of float32."""
    products = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [p.fp32_precision for p in products]
    for p in products:
        p.fp32_precision = "ieee"
    yield
    for p, precision in zip(products, before, strict=True):
        p.fp32_precision = precision
