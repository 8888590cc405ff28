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


NATIVE_DEVICES = ("cpu",)
FEWEST_GROUP_NEURONS = 8  # below it PyTorch's grouped kernels are faster: bench/FACTS.md

_forced: str | None = None
_last: dict[str, Backend] = {}
_libraries: dict[str, Library] = {}


def set_libraries(**by_device: Library) -> None:
    """Tell the dispatcher which compiled library serves which type of device."""
    _libraries.update(by_device)


def library(device_type: str) -> Library | None:
    """The compiled library for a type of device, loaded or not; None where there is none."""
    return _libraries.get(device_type)


def choose(operator: str, first: Tensor, group_neurons: int | None = None) -> Backend:
    """The implementation that `operator` takes for tensors like `first`.

    group_neurons: out_channels / groups of a grouped convolution, None of any other layer.
    Raises RuntimeError when an implementation is forced that cannot run them.
    """
    device = first.device.type
    compiled = _libraries.get(device)
    if compiled is None or device not in NATIVE_DEVICES:
        unavailable: str | None = f"there are no native kernels for {device}"
    else:
        unavailable = compiled.reason
    if _forced == "native" and unavailable:
        raise RuntimeError(f"native is forced for {operator}, but {unavailable}")
    if _forced:
        return Backend(_forced, "forced")
    if unavailable:
        return Backend("composed", unavailable)
    if group_neurons is not None and group_neurons < FEWEST_GROUP_NEURONS:
        return Backend("composed", f"groups of {group_neurons} are too few neurons for a tile")
    return Backend("native", f"compiled kernels for {device} are loaded")


def implementation(operator: str, first: Tensor, group_neurons: int | None = None) -> ModuleType:
    """The module whose function `operator` is to be called, noted as the last that ran."""
    backend = choose(operator, first, group_neurons)
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
