"""Which implementation runs an operator, and why: the only place that chooses.

Implementations are modules with one function per operator; operators ask here, kernels never do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import ModuleType

from torch import Tensor

from ghl_kernels import composed, native
from ghl_kernels.library import Library
from ghl_kernels.rule import check_choice

IMPLEMENTATIONS: dict[str, ModuleType] = {"native": native, "composed": composed}


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation's name (`native` or `composed`) and why a call takes it."""

    name: str
    reason: str


_forced: str | None = None
_last: dict[str, Backend] = {}
_libraries: dict[str, Library] = {}


def set_libraries(**by_device: Library) -> None:
    """Tell the dispatcher which compiled library serves which type of device."""
    _libraries.update(by_device)


def library(device_type: str) -> Library | None:
    """The compiled library for a type of device, loaded or not; None where there is none."""
    return _libraries.get(device_type)


def choose(operator: str, first: Tensor) -> Backend:
    """The implementation that `operator` takes for tensors like `first`.

    Raises RuntimeError when an implementation is forced that cannot run them.
    """
    device = first.device.type
    compiled = _libraries.get(device)
    if compiled is None or not NATIVE_OPERATORS.get(device):
        unavailable: str | None = f"there are no native kernels for {device}"
    else:
        unavailable = compiled.reason
    if _forced == "native" and unavailable:
        raise RuntimeError(f"native is forced for {operator}, but {unavailable}")
    if _forced:
        return Backend(_forced, "forced")
    if unavailable:
        return Backend("composed", unavailable)
    return Backend("native", f"compiled kernels for {device} are loaded")


NATIVE_OPERATORS = {"cpu": True}


def implementation(operator: str, first: Tensor) -> ModuleType:
    """The module whose function `operator` is to be called, noted as the last that ran."""
    backend = choose(operator, first)
    _last[operator] = backend
    return IMPLEMENTATIONS[backend.name]


def last(operator: str) -> Backend | None:
    """The implementation that ran the most recent call of `operator`, None before the first."""
    return _last.get(operator)


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Make every call inside take the implementation `name`, on all threads, or fail clearly."""
    global _forced
    check_choice("name", name, IMPLEMENTATIONS)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
