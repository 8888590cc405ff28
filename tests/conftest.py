"""What every test shares: a seed, poisoned memory, a number of threads, a forced implementation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings

import ghl_kernels
from ghl_kernels import composed, dispatch, layout, native

settings.register_profile(
    "ghl",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("ghl")


class PoisonedTorch(ModuleType):
    """torch, except that memory nobody has written yet holds NaN."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.empty(*args, **kwargs).fill_(float("nan"))

    @staticmethod
    def empty_like(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.empty_like(*args, **kwargs).fill_(float("nan"))


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
    for implementation in (native, composed, layout):
        monkeypatch.setattr(implementation, "torch", PoisonedTorch())


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


@pytest.fixture(params=["native", "composed"])
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Forces one implementation and, when the test is over, asserts that it is the one that ran."""
    library = dispatch.library("cpu")
    if request.param == "native" and not (library and library.loaded):
        pytest.skip(f"no native kernels: {library.reason if library else 'no library for cpu'}")
    ran: dict[str, ghl_kernels.Backend] = {}
    monkeypatch.setattr(dispatch, "_last", ran)
    with ghl_kernels.force(request.param):
        yield request.param
    assert {operator: ghl_kernels.last(operator).name for operator in ran} == dict.fromkeys(
        ran, request.param
    )
    assert ran, "the test reached no operator"
