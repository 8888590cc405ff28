"""The update of a layer under the names it is measured by: ours, each of ours forced, the others'.

`call` gives a function of no arguments that computes the update once, and nothing else.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import ghl_kernels
from ghl.bench import formulas
from ghl.bench.layers import Layer
from ghl_kernels import dispatch
from ghl_kernels.tuning import tiles

FORCED = tiles.STRATEGIES
OURS = ("ghl", *FORCED)
COMPOSITIONS = ("natural", "natural.compiled", "trick", "trick.matmul")  # of PyTorch's operators
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


@functools.cache
def compiled(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One compilation for each shape, and an error instead of uncompiled code if that fails.

    One for all shapes reduces large weights as it would the first, in a single block: an epilogue
    of a million weights took a millisecond.
    """
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(dynamo, limit, max(1024, getattr(dynamo, limit)))
    return torch.compile(formula, dynamic=False, fullgraph=True)


def names(layer: Layer, mode: str, device: torch.device) -> list[str]:
    """What a layer is measured by; `authors` is the published layer, in float32 as published."""
    of_other_bits = tiles.BY_PATCHES if mode == "bfloat16" else tiles.BY_SM90
    on_gpu = tuple(name for name in OURS if name not in of_other_bits)
    ours = on_gpu if device.type == "cuda" else ("ghl", *of_a_cpu())
    if mode != "bfloat16":
        return [*ours, "natural", "trick", *(["authors"] if layer.groups == 1 else [])]
    dense = not layer.linear and layer.groups == 1
    pointwise = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
    matmul = ["trick.matmul"] if dense and pointwise else []
    return [*ours, "natural", "natural.compiled", "trick", *matmul]


def of_a_cpu() -> tuple[str, ...]:
    """Those of ours for a GPU that a CPU runs: Triton's, under its interpreter."""
    interprets = not dispatch.triton_missing() and dispatch.interpreted()
    return tiles.BY_TRITON if interprets else ()


@contextmanager
def forced(name: str) -> Iterator[None]:
    """The implementation `name` where it is one of ours that can be forced, else no change."""
    with ghl_kernels.force(name) if name in FORCED else nullcontext():
        yield


def ours_call(layer: Layer, tensors: Tensors, operator: str) -> Callable[[], tuple[Tensor, ...]]:
    """linear_ or conv2d_ `pair` or `update` of the rule `ghl`."""
    rest = ("oja", "sign", "absmax") if operator == "update" else ("rows",)
    choices = "softmax", layer.tau, *rest
    if layer.linear:
        function = getattr(torch.ops.ghl_kernels, f"linear_{operator}")
        return lambda: function(*tensors, *choices)
    function = getattr(torch.ops.ghl_kernels, f"conv2d_{operator}")
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    return lambda: function(*tensors, *geometry, *choices)


def call(layer: Layer, name: str, tensors: Tensors) -> Callable[[], Tensor]:
    """The update by the implementation of that name; `forced` has to surround calls of ours."""
    if name in OURS:
        update = ours_call(layer, tensors, "update")
        return lambda: update()[0]
    if layer.dilation != (1, 1):
        raise ValueError(
            f"{layer.name} has dilation {layer.dilation}: {name} is not written for it"
        )
    x, y, g, w = (t[:, :, None, None] if layer.linear else t for t in tensors)
    if name == "trick.matmul":
        return lambda: formulas.trick_by_matmul(x, y, g, w, layer.tau, compiled(formulas.oja))
    rest = layer.padding, layer.tau, layer.stride
    if name == "authors":
        x, y, g, w = (t.contiguous() for t in (x, y, g, w))
        return lambda: formulas.authors(x, y, g, w, *rest)
    if name == "trick":
        epilogue = compiled(formulas.oja) if x.is_cuda else formulas.oja
        return lambda: formulas.trick(x, y, g, w, *rest, layer.groups, epilogue)
    natural = compiled(formulas.natural) if name == "natural.compiled" else formulas.natural
    return lambda: natural(x, y, g, w, *rest, layer.groups)
