"""Which implementation runs an operator, and why: the only place that chooses.

Implementations are modules with `pair`, `update`, `merge`, `foreach_merge` and `logsumexp`;
operators ask here, kernels never do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ghl_kernels import library as libraries
from ghl_kernels import native
from ghl_kernels.cuda import kernels
from ghl_kernels.layout import LARGEST_SIZE
from ghl_kernels.library import Library
from ghl_kernels.problem import Problem, dot_precision
from ghl_kernels.rule import check_choice
from ghl_kernels.tapes import player
from ghl_kernels.tuning import tiles, trial
from ghl_kernels.tuning.tiles import BY_CUDA, BY_PATCHES, BY_SM90, BY_TRITON, Entry

IMPLEMENTATIONS = {
    "native": "ghl_kernels.native",
    "composed": "ghl_kernels.composed",
    "triton": "ghl_kernels.triton.fused",
    "triton_stored": "ghl_kernels.triton.stored",
    "library": "ghl_kernels.triton.library",
    "library_patches": "ghl_kernels.triton.library_patches",
    "cuda": "ghl_kernels.cuda.fused",
    "cuda_sm90": "ghl_kernels.cuda.sm90",
    "cuda_sm90_stored": "ghl_kernels.triton.sm90_stored",
    "cuda_sm90_exchanged": "ghl_kernels.cuda.sm90_exchanged",
}


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation's name, and why a call takes it.

    `native` C++ kernels; `composed` PyTorch's operators; `triton` u only in tiles; `triton_stored`
    u written once and Triton's products; `library` u written once and cuBLAS's or cuDNN's;
    `library_patches` the same with x laid out as cuBLAS multiplies it fastest in TF32; `cuda`
    kernels compiled ahead of time, u only in registers; `cuda_sm90` the same by Hopper's own
    instructions, u in shared memory; `cuda_sm90_stored` u written once by Triton and its products;
    `cuda_sm90_exchanged` u made once by all blocks of threads together, chunk by chunk in L2.
    """

    name: str
    reason: str


MOST_GROUPS = 65535  # blocks in the third dimension of a grid
MOST_SETTLED = 4096  # calls alike whose implementation is remembered

_forced: str | None = None
_last: dict[str, tuple[Backend, int]] = {}  # and how many calls had been played by then
_noted: list[Backend] = []  # what tapes that are played without Python took
_here = threading.local()  # the same of this thread: autograd has one for every device
_warned: set[str] = set()
_settled: dict[tuple[Any, ...], Backend] = {}
_unsettled = 0  # how many times `unsettle` was called: part of every key


def unsettle() -> None:
    """Forget what calls took before."""
    global _unsettled
    _unsettled += 1
    _settled.clear()
    player.forget()


def forget() -> None:
    """That, and all that was looked up for it: a library or a table is another one now."""
    tiles.forget()
    kernels.forget()
    unsettle()


def native_unavailable(device: torch.device) -> str | None:
    """Why the C++ kernels cannot run on a device; None if they can."""
    compiled = libraries.serving(device.type)
    if compiled is None or device.type != "cpu":
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
    if first.device.type != "cuda" and not interpreted():
        return f"Triton does not compile for {first.device.type}"
    return beyond_kernels(first, problem)


def patches_unavailable(first: Tensor, problem: Problem | None) -> str | None:
    """Why products with patches along the rows cannot run this call; None if they can."""
    if problem is not None and problem.dtype != torch.float32:
        return f"its products are of float32 numbers, not {problem.dtype}"
    if problem is not None and problem.groups > 1:
        return f"its products are of one group, not of {problem.groups}"
    return triton_unavailable(first, problem)


def beyond_kernels(first: Tensor, problem: Problem | None) -> str | None:
    """What no kernel of ours for a GPU can do of this call; None if they can."""
    if first.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(first.device)
        if major < 8:
            return f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"
    if first.dtype == torch.float64:
        return "the kernels for a GPU have no float64"
    if problem is not None:
        weights = problem.all_neurons * problem.columns
        if max(problem.rows, weights, problem.image) > LARGEST_SIZE:
            return "rows, weights or the numbers of one image are more than 2**31 - 2**17"
    return None


def cuda_unavailable(name: str, first: Tensor, problem: Problem | None) -> str | None:
    """Why the compiled CUDA kernels cannot run this call; None if they can."""
    compiled = libraries.serving("cuda")
    if compiled is None or not compiled.loaded:
        return f"the CUDA library: {compiled.reason if compiled else 'not looked for'}"
    if first.device.type != "cuda":
        return f"the CUDA kernels do not run on {first.device.type}"
    beyond = beyond_kernels(first, problem)
    if beyond:
        return beyond
    if problem is not None and problem.groups > MOST_GROUPS:
        return f"the CUDA kernels take at most {MOST_GROUPS} groups"
    capability = torch.cuda.get_device_capability(first.device)
    if name in BY_SM90:
        without = triton_unavailable(first, problem) if name == "cuda_sm90_stored" else None
        without = without or sm90_unavailable(compiled, capability)
        return without or (kernels.sm90_unfit(name, problem) if problem else None)
    return libraries.unfit(compiled, capability)


def sm90_unavailable(compiled: Library, capability: tuple[int, int]) -> str | None:
    """Why the kernels of Hopper's own instructions cannot run on a GPU; None if they can."""
    architectures = libraries.architectures(compiled)
    if "9.0a" not in architectures:
        return f"the CUDA library was compiled for {' '.join(architectures)}, without 9.0a"
    if capability != (9, 0):
        major, minor = capability
        return f"the GPU has compute capability {major}.{minor}, not 9.0"
    return None


def interpreted() -> bool:
    """Whether the kernels run under Triton's interpreter, as tests on a CPU have them."""
    kernels = importlib.import_module("ghl_kernels.triton.merge")
    return type(kernels.measure_kernel).__name__ == "InterpretedFunction"


def unavailable(name: str, first: Tensor, problem: Problem | None) -> str | None:
    """Why an implementation cannot run a call; None if it can."""
    if name == "native":
        return native_unavailable(first.device)
    if name in BY_CUDA:
        return cuda_unavailable(name, first, problem)
    if name in BY_PATCHES:
        return patches_unavailable(first, problem)
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
        return choose_on_gpu(operator, first, problem)
    reason = native_unavailable(first.device)
    if reason:
        return Backend("composed", reason)
    if problem is not None and (few := native.too_few(problem)):
        return Backend("composed", few)
    return Backend("native", f"compiled kernels for {first.device.type} are loaded")


def choose_on_gpu(operator: str, first: Tensor, problem: Problem | None) -> Backend:
    """The first of the preferred implementations whose trial does not fail."""
    by_triton = triton_unavailable(first, problem)
    by_cuda = cuda_unavailable("cuda", first, problem)
    if by_triton and by_cuda:
        both = by_triton if by_triton == by_cuda else f"{by_triton}; {by_cuda}"
        return fall_back("composes PyTorch's operators", both)
    here: tuple[str, ...] = () if by_triton else BY_TRITON
    here += () if by_cuda else ("cuda",)
    if problem and matmul_precision() == "tf32" and not patches_unavailable(first, problem):
        here += BY_PATCHES  # whose products obey the flag of matrix products, a convolution's too
    preferred = preferences(here, first, problem) if problem else of_sums(here, first)
    failures: list[str] = []
    for name, entry, reason in preferred:
        module = IMPLEMENTATIONS[name]
        if problem is None or entry is None:
            failure = trial.failure_of_sums(first.device, module, operator)
        else:
            merged = operator.endswith("_update")
            failure = trial.failure(problem, entry, first.device, module, merged)
        if failure is None and not failures:
            return Backend(name, reason)
        if failure is None:
            fall_back(f"takes {name}", why(failures))
            return Backend(name, why(failures))
        failures.append(failure)
    if not failures:
        failures.append(f"table {tiles.table(first.device).name} has no entry that runs here")
    return fall_back("composes PyTorch's operators", why(failures))


def why(failures: Sequence[str]) -> str:
    """The failure to be told: one that passes, for which nothing is settled, or the first."""
    return next((f for f in failures if isinstance(f, trial.Passing)), failures[0])


def fall_back(instead: str, reason: str) -> Backend:
    """PyTorch's operators, or what is done instead, said once for each reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"ghl_kernels {instead}: {reason}", stacklevel=2)
    return Backend("composed", reason)


Preference = tuple[str, Entry | None, str]  # an implementation, its tile and why


def of_sums(here: tuple[str, ...], first: Tensor) -> Iterator[Preference]:
    """For merges and log-sum-exps: what was measured; else kernels that need no compiler now.

    An optimizer's first step then waits for no compilation, and all layers are one launch.
    """
    measured = tiles.table(first.device).merges
    if measured in here:
        yield measured, None, "the fastest that was measured"
    for name in ("cuda", "triton"):
        if name in here and name != measured:
            yield name, None, "kernels for every GPU from compute capability 8.0"


def preferences(here: tuple[str, ...], first: Tensor, problem: Problem) -> Iterator[Preference]:
    """For a layer: what the table of tiles has for its sizes, and `cuda` behind it.

    Without a measurement Triton's comes first; Hopper's own are only ever taken by a measurement.
    """
    copied = ""
    if problem.copied_bytes:
        moved = problem.copied_bytes / 1e6
        copied = f"; {moved:.1f} MB moved first to bring activations into channels_last"
    table, taken = tiles.table(first.device), ""
    measured = here if table.measured else tuple(name for name in here if name in BY_TRITON)
    if table.measured:
        measured += tuple(n for n in BY_SM90 if not cuda_unavailable(n, first, problem))
    if dot_precision(problem) == "ieee":
        if "library" in here:
            taken = "library"
            reason = "float32 without TF32 has no tensor-core product"
            yield taken, tiles.choose(problem, first.device), reason + copied
    elif entry := tiles.find(problem, first.device, among=measured):
        taken = entry.strategy
        yield taken, entry, reason_of(entry, table) + copied
    if "cuda" in here and taken != "cuda":
        entry = kernels.choose("cuda", problem, first.device)
        yield "cuda", entry, "compiled kernels, their tile by a rule of thumb" + copied


def reason_of(entry: Entry, table: tiles.Table) -> str:
    origin = f"measured on {table.gpu}" if entry.measured and table.gpu else "not measured"
    return (
        f"nearest in table {table.name} ({origin}): {entry.kind}, {entry.rows} rows, "
        f"{entry.neurons} neurons of {entry.columns} weights"
    )


def implementation(operator: str, first: Tensor, problem: Problem | None = None) -> ModuleType:
    """The module that is to run `operator`, noted as the last that did."""
    backend = settled(operator, first, problem)
    note(operator, backend)
    return module_of(backend.name)


@functools.cache
def module_of(name: str) -> ModuleType:
    return importlib.import_module(IMPLEMENTATIONS[name])


def settled(operator: str, first: Tensor, problem: Problem | None) -> Backend:
    """`choose`, on a GPU remembered for calls alike: choosing takes as long as launching."""
    if _forced or first.device.type != "cuda":
        return choose(operator, first, problem)
    key: tuple[Any, ...] = operator, first.device, first.dtype, problem, tiles.used()
    if problem is not None:
        key += problem.image, problem.copied_bytes, *state(first)
    backend = _settled.get(key)
    if backend is None:
        backend = choose(operator, first, problem)
        if may_settle(backend):
            if len(_settled) >= MOST_SETTLED:
                _settled.clear()
            _settled[key] = backend
    return backend


def may_settle(backend: Backend) -> bool:
    """Whether a later call may take what this one did. In a graph's capture nothing is tried, and
    memory that was lacking may be there the next time."""
    passing = isinstance(backend.reason, trial.Passing)
    return not (passing or torch.cuda.is_current_stream_capturing())


def settled_last(operator: str) -> Backend | None:
    """What this thread's most recent call took, if calls like it will take the same."""
    backend = vars(_here).get(operator)
    return backend if backend is not None and may_settle(backend) else None


def is_forced() -> bool:
    """Whether an implementation or a tile is forced, so that a call takes what others do not."""
    return _forced is not None or tiles.used() is not None


def state(first: Tensor) -> tuple[Any, ...]:
    """What a call depends on besides its arguments: products that may be TF32, and what was
    forgotten."""
    if first.dtype != torch.float32:
        return (_unsettled,)
    backends: Any = torch.backends
    return _unsettled, matmul_precision(), backends.cudnn.conv.fp32_precision


def matmul_precision() -> str:
    backends: Any = torch.backends
    return str(backends.cuda.matmul.fp32_precision)


def note(operator: str, backend: Backend) -> None:
    """That an implementation has run an operator."""
    _last[operator] = backend, player.last(operator)[0]
    vars(_here)[operator] = backend


def noted(backend: Backend) -> int:
    """A number for a tape, by which `last` finds what it took."""
    if backend not in _noted:
        _noted.append(backend)
    return _noted.index(backend)


def last(operator: str) -> Backend | None:
    """The implementation that ran the most recent call of `operator`, None before the first."""
    if operator not in _last:
        return None
    backend, before = _last[operator]
    played, note = player.last(operator)
    return _noted[note] if played > before else backend


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Make every call inside take the implementation `name`, on all threads, or fail clearly."""
    global _forced
    check_choice("name", name, IMPLEMENTATIONS)
    before, _forced = _forced, name
    try:
        with player.paused():
            yield
    finally:
        _forced = before
