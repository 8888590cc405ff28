"""Before a layer's sizes first take kernels of ours on a GPU, they are tried on a small batch.

Kernels that do not compile there, do not launch, or disagree with PyTorch's own operators are not
used: the dispatcher takes another implementation instead and says why. One host synchronisation for
each layer, implementation and process, none while a graph is captured.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ghl_kernels import composed
from ghl_kernels.checks import output_size
from ghl_kernels.problem import Problem, dot_precision
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import Entry

BATCH, SIZE = 4, 16
WEIGHT = 65, 33, 3, 3  # of the layer whose sums are merged
SUMS = "G", "H0", "rows", "sums of u"
MERGE = "oja", "hebb", "absmax"
# Of the largest sum, where PyTorch's own operators lose a tenth of it: a trial finds a kernel that
# computes something else, not one that rounds a little more.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class Passing(str):
    """A failure that the next call may not meet."""


def small_batch(problem: Problem, device: torch.device) -> tuple[Problem, tuple[Tensor, ...]]:
    """A layer of these sizes for a few rows, more where it pads more, and its x, y, g and w.

    Its rows are counted: a trial is one for all layers of these sizes, and what is not there cannot
    be compared.
    """
    totals = "sums" if problem.sum_u else "rows"
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        options: dict[str, Any] = {"device": device, "dtype": torch.float32}
        return torch.randn(*shape, generator=generator, **options).to(problem.dtype)

    neurons, wanted = problem.all_neurons, (problem.competition, totals)
    if problem.linear:
        rows = BATCH * SIZE * SIZE
        x, w = random(rows, problem.channels), random(neurons, problem.channels)
        tensors = x, random(rows, neurons), random(rows, neurons), w
        return Problem.of_linear(x, w, *wanted), tensors
    kernel_size, geometry = problem.kernel_size, (problem.stride, problem.padding, problem.dilation)
    reach = [d * (k - 1) + 1 for d, k in zip(problem.dilation, kernel_size, strict=True)]
    size = [SIZE * s + r for s, r in zip(problem.stride, reach, strict=True)]
    out = output_size(size, kernel_size, *geometry)
    x = random(BATCH, problem.groups * problem.channels, *size)
    w = random(neurons, problem.channels, *kernel_size)
    activations = x, random(BATCH, neurons, *out), random(BATCH, neurons, *out)
    x, y, g = (t.contiguous(memory_format=torch.channels_last) for t in activations)
    if problem.channels_last:
        w = w.contiguous(memory_format=torch.channels_last)
    return Problem.of_conv2d(x, y, g, w, *geometry, problem.groups, *wanted), (x, y, g, w)


def raised(what: str, error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"a trial of {what} raised {type(error).__name__}: {first_line}"


def disagreement(
    problem: Problem, device: torch.device, implementation: str, merged: bool = False
) -> str | None:
    """What is wrong with an implementation's pair on a small batch, and with its merge of that;
    None if nothing is."""
    small, tensors = small_batch(problem, device)
    try:
        module = importlib.import_module(implementation)
        tried = module.pair(small, *tensors, 1.0)
        x, y, g, w = (t.float() for t in tensors)
        wanted = composed.pair(small, x, y, g, w, 1.0)
        parts = 4 if problem.sum_u else 3
        pairs = zip(*((G, H0, t[-1:], t[:-1]) for G, H0, t in (tried, wanted)), strict=True)
        errors = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in [*pairs][:parts]])
        off_by = errors.tolist()
        if merged and not agree(merges(module, (*tried, tensors[3]))):
            return off(f"merge by {implementation}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return raised(implementation, error)
    if not all(error <= TOLERANCE[problem.dtype] for error in off_by):
        errors_of = ", ".join(f"{e:.2g} ({n})" for e, n in zip(off_by, SUMS, strict=False))
        return f"{off(implementation)} by {errors_of} of the largest number"
    return None


Pairs = list[tuple[Tensor, Tensor]]  # what is tried, and what PyTorch's operators give


def merges(module: ModuleType, sums: Sequence[Tensor]) -> Pairs:
    """Of one layer: G, H0, totals and w."""
    G, H0, rows, w = sums
    found, wanted = (m.merge(G, H0, rows, w, *MERGE) for m in (module, composed))
    return list(zip(found, wanted, strict=True))


def agree(pairs: Pairs) -> bool:
    right = [(a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in pairs]
    return bool(torch.stack(right).all().item())


def off(what: str) -> str:
    return f"a trial of {what} is off from PyTorch's operators"


@functools.lru_cache(maxsize=4096)
def remembered(
    problem: Problem,
    entry: Entry,
    device: torch.device,
    implementation: str,
    merged: bool,
    precision: str,
) -> str | None:
    with tiles.use(entry):
        return disagreement(problem, device, implementation, merged)


def failure(
    problem: Problem, entry: Entry, device: torch.device, implementation: str, merged: bool = False
) -> str | None:
    """Why layers of these sizes must not take an implementation (a module) with this entry.
    merged: for an update, which merges as well."""
    if torch.cuda.is_current_stream_capturing():
        return None
    sizes, precision = dataclasses.replace(problem, rows=0), dot_precision(problem)
    try:
        return remembered(sizes, entry, device, implementation, merged, precision)
    except torch.OutOfMemoryError:  # not for ever: there may be memory the next time
        return Passing(f"a trial of {implementation} found too little memory")


def disagreement_of_sums(device: torch.device, implementation: str, operator: str) -> str | None:
    """What is wrong with an implementation's logsumexp, or, for another operator, with its merge of
    one layer or of many; None if nothing is."""
    options: dict[str, Any] = {"device": device, "dtype": torch.float32}
    options["generator"] = torch.Generator(device).manual_seed(0)
    G, H0, w = torch.randn(3, *WEIGHT, **options)
    sums = G, H0, torch.rand(WEIGHT[0] + 1, **options), w
    try:
        tried = importlib.import_module(implementation)
        if operator == "logsumexp":
            pairs = [(tried.logsumexp(G, 0.5, 1), composed.logsumexp(G, 0.5, 1))]
        else:
            pairs = merges(tried, sums)
            many = tried.foreach_merge(*([t, t] for t in sums), *MERGE)
            pairs += [(both[1], wanted) for both, (_, wanted) in zip(many, pairs, strict=True)]
        if not agree(pairs):
            return off(f"{operator} by {implementation}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return raised(f"{operator} by {implementation}", error)
    return None


remembered_of_sums = functools.cache(disagreement_of_sums)


def failure_of_sums(device: torch.device, implementation: str, operator: str) -> str | None:
    """Why an operator without activations must not be an implementation's (a module's) there."""
    if torch.cuda.is_current_stream_capturing():
        return None
    tried = "logsumexp" if operator == "logsumexp" else "merge"
    try:
        return remembered_of_sums(device, implementation, tried)
    except torch.OutOfMemoryError:
        return Passing(f"a trial of {tried} by {implementation} found too little memory")
