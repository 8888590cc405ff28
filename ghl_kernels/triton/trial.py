"""Before a layer's sizes first take a Triton strategy on a GPU, it is tried on a small batch.

A kernel that does not compile there, does not launch, or disagrees with PyTorch's own operators is
not used: the dispatcher composes the update instead and says why. One host synchronisation for each
layer and process, none while a graph is captured.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib

import torch
from torch import Tensor

from ghl_kernels import composed
from ghl_kernels.checks import output_size
from ghl_kernels.problem import Problem
from ghl_kernels.triton import tiles
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.merge import merge
from ghl_kernels.triton.tiles import Entry

BATCH, SIZE = 4, 16
# Of the largest sum, where PyTorch's own operators lose a tenth of it: a trial finds a kernel that
# computes something else, not one that rounds a little more.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def small_batch(problem: Problem, device: torch.device) -> tuple[tuple[Tensor, ...], tuple]:
    """x, y, g and w of a layer of these sizes for a few rows, and its geometry if it has one."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(problem.dtype)

    rows, neurons = BATCH * SIZE * SIZE, problem.all_neurons
    if problem.linear:
        x, w = random(rows, problem.channels), random(neurons, problem.channels)
        return (x, random(rows, neurons), random(rows, neurons), w), ()
    kernel_size, stride = problem.kernel_size, problem.stride
    padding = [side // 2 for side in kernel_size] if problem.padded else [0, 0]
    dilation = problem.dilation
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    size = [SIZE * s + r for s, r in zip(stride, reach, strict=True)]
    out = output_size(size, kernel_size, stride, padding, dilation)
    x = random(BATCH, problem.groups * problem.channels, *size)
    w = random(neurons, problem.channels, *kernel_size)
    tensors = x, random(BATCH, neurons, *out), random(BATCH, neurons, *out)
    x, y, g = (t.contiguous(memory_format=torch.channels_last) for t in tensors)
    if problem.channels_last:
        w = w.contiguous(memory_format=torch.channels_last)
    return (x, y, g, w), (list(stride), padding, list(dilation), problem.groups)


def raised(what: str, error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"a trial of {what} raised {type(error).__name__}: {first_line}"


def disagreement(problem: Problem, device: torch.device, implementation: str) -> str | None:
    """What is wrong with an implementation's pair on a small batch; None if nothing is."""
    tensors, geometry = small_batch(problem, device)
    name = "linear_pair" if problem.linear else "conv2d_pair"
    rule = problem.competition, 1.0, problem.sum_u
    try:
        tried = getattr(importlib.import_module(implementation), name)(*tensors, *geometry, *rule)
        wanted = getattr(composed, name)(*(t.float() for t in tensors), *geometry, *rule)
        errors = [
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(tried[:2], wanted[:2], strict=True)
        ]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return raised(implementation, error)
    if not max(errors) <= TOLERANCE[problem.dtype]:
        return (
            f"a trial of {implementation} is off from PyTorch's operators by {errors[0]:.2g} (G) "
            f"and {errors[1]:.2g} (H0) of the largest number"
        )
    return None


@functools.lru_cache(maxsize=4096)
def remembered(
    problem: Problem, entry: Entry, device: torch.device, implementation: str
) -> str | None:
    with tiles.use(entry):
        return disagreement(problem, device, implementation)


def failure(
    problem: Problem, entry: Entry, device: torch.device, implementation: str
) -> str | None:
    """Why layers of these sizes must not take an implementation (a module) with this entry."""
    if torch.cuda.is_current_stream_capturing():
        return None
    try:
        return remembered(dataclasses.replace(problem, rows=0), entry, device, implementation)
    except torch.OutOfMemoryError:  # not for ever: there may be memory the next time
        return f"a trial of {implementation} found too little memory"


def disagreement_of_merges(device: torch.device) -> str | None:
    """What is wrong with the merge of one layer or of many; None if nothing is."""
    generator = torch.Generator(device).manual_seed(0)
    G, H0, w = torch.randn(3, 65, 33, 3, 3, generator=generator, device=device)
    sums = G, H0, torch.rand(66, generator=generator, device=device), w
    choices = "oja", "hebb", "absmax"
    try:
        lists = [[t, t] for t in sums]
        many = foreach_merge(lists[0], lists[1], lists[2], lists[3], *choices)
        found = merge(*sums, *choices), [result[1] for result in many]
        wanted = composed.merge(*sums, *choices)
        for result in found:
            for a, b in zip(result, wanted, strict=True):
                if not ((a - b).abs().max() <= 1e-4 * b.abs().max()).item():
                    return "a trial of Triton's merge is off from PyTorch's operators"
    except Exception as error:
        return raised("Triton's merge", error)
    return None


remembered_of_merges = functools.cache(disagreement_of_merges)


def failure_of_merges(device: torch.device) -> str | None:
    """Why merges must not be Triton's on this device."""
    return None if torch.cuda.is_current_stream_capturing() else remembered_of_merges(device)
