"""Which implementation runs an operator, and why: the only place that chooses.

Implementations are modules with one function per operator; operators ask here, kernels never do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from ghl_kernels.library import Library
from ghl_kernels.problem import Problem
from ghl_kernels.rule import check_choice

IMPLEMENTATIONS = {
    "native": "ghl_kernels.native",
    "composed": "ghl_kernels.composed",
    "triton": "ghl_kernels.triton.fused",
    "triton_stored": "ghl_kernels.triton.stored",
    "library": "ghl_kernels.triton.library",
}
BY_TRITON = ("triton", "triton_stored", "library")


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation's name, and why a call takes it.

    `native` C++ kernels; `composed` PyTorch's operators; `triton` u only in tiles; `triton_stored`
    u written once and Triton's products; `library` u written once and cuBLAS's or cuDNN's.
    """

    name: str
    reason: str


NATIVE_DEVICES = ("cpu",)
FEWEST_GROUP_NEURONS = 8  # below it PyTorch's grouped kernels are faster: bench/FACTS.md
LARGEST = 2**31 - 2**16  # 32-bit numbers that a step over the last tile cannot overflow

_forced: str | None = None
_last: dict[str, Backend] = {}
_libraries: dict[str, Library] = {}
_warned: set[str] = set()


def set_libraries(**by_device: Library) -> None:
    """Tell the dispatcher which compiled library serves which type of device."""
    _libraries.update(by_device)


def library(device_type: str) -> Library | None:
    """The compiled library for a type of device, loaded or not; None where there is none."""
    return _libraries.get(device_type)


def native_unavailable(device: torch.device) -> str | None:
    """Why the C++ kernels cannot run on a device; None if they can."""
    compiled = _libraries.get(device.type)
    if compiled is None or device.type not in NATIVE_DEVICES:
        return f"there are no native kernels for {device.type}"
    return compiled.reason


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be imported; None if it can."""
    try:
        importlib.import_module(IMPLEMENTATIONS["triton"])
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


def triton_unavailable(first: Tensor, problem: Problem | None) -> str | None:
    """Why the Triton kernels cannot run this call; None if they can."""
    if triton_missing():
        return triton_missing()
    if first.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(first.device)
        if major < 8:
            return f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"
    elif not interpreted():
        return f"Triton does not compile for {first.device.type}"
    if first.dtype == torch.float64:
        return "the Triton kernels have no float64"
    if problem is not None:
        weights = problem.all_neurons * problem.columns
        if max(problem.rows, weights, problem.image) > LARGEST:
            return "rows, weights or the numbers of one image are more than 2**31 - 2**16"
    return None


def interpreted() -> bool:
    """Whether the kernels run under Triton's interpreter, as tests on a CPU have them."""
    kernels = importlib.import_module("ghl_kernels.triton.merge")
    return type(kernels.measure_kernel).__name__ == "InterpretedFunction"


def unavailable(name: str, first: Tensor, problem: Problem | None) -> str | None:
    """Why an implementation cannot run a call; None if it can."""
    if name == "native":
        return native_unavailable(first.device)
    return triton_unavailable(first, problem) if name in BY_TRITON else None


def choose(operator: str, first: Tensor, problem: Problem | None = None) -> Backend:
    """The implementation that `operator` takes for tensors like `first` and a layer's sizes.

    Raises RuntimeError when an implementation is forced that cannot run them.
    """
    if _forced:
        reason = unavailable(_forced, first, problem)
        if reason:
            raise RuntimeError(f"{_forced} is forced for {operator}, but {reason}")
        return Backend(_forced, "forced")
    if first.device.type == "cuda":
        return choose_on_gpu(first, problem)
    reason = native_unavailable(first.device)
    if reason:
        return Backend("composed", reason)
    if problem is not None and problem.groups > 1 and problem.neurons < FEWEST_GROUP_NEURONS:
        return Backend("composed", f"groups of {problem.neurons} are too few neurons for a tile")
    return Backend("native", f"compiled kernels for {first.device.type} are loaded")


def choose_on_gpu(first: Tensor, problem: Problem | None) -> Backend:
    reason = triton_unavailable(first, problem)
    if reason:
        return fall_back(reason)
    trial = importlib.import_module("ghl_kernels.triton.trial")
    if problem is None:
        failure = trial.failure_of_merges(first.device)
        if failure:
            return fall_back(failure)
        return Backend("triton", "kernels for every GPU from compute capability 8.0")
    return tuned(problem, first.device)


def fall_back(reason: str) -> Backend:
    """PyTorch's operators, said once for each reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"ghl_kernels composes PyTorch's operators: {reason}", stacklevel=2)
    return Backend("composed", reason)


def tuned(problem: Problem, device: torch.device) -> Backend:
    """What the table of tiles has for a layer's sizes."""
    tiles = importlib.import_module("ghl_kernels.triton.tiles")
    split_k = importlib.import_module("ghl_kernels.triton.split_k")
    if split_k.dot_precision(problem) == "ieee":
        return Backend("library", "float32 without TF32 has no tensor-core product")
    entry, table = tiles.choose(problem, device), tiles.table(device)
    trial = importlib.import_module("ghl_kernels.triton.trial")
    failure = trial.failure(problem, entry, device, IMPLEMENTATIONS[entry.strategy])
    if failure:
        return fall_back(failure)
    origin = "measured" if table.measured else "computed"
    reason = (
        f"nearest in table {table.name} ({origin}): {entry.kind}, {entry.rows} rows, "
        f"{entry.neurons} neurons of {entry.columns} weights"
    )
    if problem.copied_bytes:
        copied = problem.copied_bytes / 1e6
        reason += f"; {copied:.1f} MB moved first to bring activations into channels_last"
    return Backend(entry.strategy, reason)


def implementation(operator: str, first: Tensor, problem: Problem | None = None) -> ModuleType:
    """The module whose function `operator` is to be called, noted as the last that ran."""
    backend = choose(operator, first, problem)
    _last[operator] = backend
    return importlib.import_module(IMPLEMENTATIONS[backend.name])


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
