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
from ghl_kernels.problem import Problem
from ghl_kernels.triton import tiles
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
    size = [SIZE * s + k for s, k in zip(stride, kernel_size, strict=True)]
    out = [
        (n + 2 * p - k) // s + 1
        for n, p, k, s in zip(size, padding, kernel_size, stride, strict=True)
    ]
    x = random(BATCH, problem.groups * problem.channels, *size)
    w = random(neurons, problem.channels, *kernel_size)
    tensors = x, random(BATCH, neurons, *out), random(BATCH, neurons, *out), w
    channels_last = (t.contiguous(memory_format=torch.channels_last) for t in tensors)
    return tuple(channels_last), (list(stride), padding, [1, 1], problem.groups)


def disagreement(problem: Problem, device: torch.device, implementation: str) -> str | None:
    """What is wrong with an implementation's pair on a small batch; None if nothing is."""
    tensors, geometry = small_batch(problem, device)
    name = "linear_pair" if problem.linear else "conv2d_pair"
    rule = "softmax", 1.0
    try:
        tried = getattr(importlib.import_module(implementation), name)(*tensors, *geometry, *rule)
        wanted = getattr(composed, name)(*(t.float() for t in tensors), *geometry, *rule)
        errors = [
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(tried[:2], wanted[:2], strict=True)
        ]
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        return f"a trial of {implementation} raised {type(error).__name__}: {first_line}"
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
    return remembered(dataclasses.replace(problem, rows=0), entry, device, implementation)
