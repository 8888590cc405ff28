"""What `make bench` measures on a CPU: layers, and by what their update is computed.

Shapes and formulas are `ghl.bench`'s, which measures whole networks with them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ghl_kernels
from ghl.bench.implementations import Tensors, call
from ghl.bench.layers import Layer, layers_of

DEEPHEBB = {f"deephebb.{layer.name}": layer for layer in layers_of("deephebb_b64")}
CASES = DEEPHEBB | {"linear.784.2000": Layer("linear", 512, 784, 2000, linear=True)}
IMPLEMENTATIONS = ("ghl", "ghl.composed", "authors", "natural", "natural.compiled", "trick")


def tensors(layer: Layer) -> Tensors:
    """x, y, g and w as the published code has them: float32, contiguous."""
    return layer.tensors(torch.float32, torch.device("cpu"), channels_last=False)


def update(layer: Layer, name: str, tensors: Tensors) -> Callable[[], Tensor]:
    """A function that computes the update once, by one of IMPLEMENTATIONS."""
    if name != "ghl.composed":
        return call(layer, name, tensors)
    ours = call(layer, "ghl", tensors)

    def composed() -> Tensor:
        with ghl_kernels.force("composed"):
            return ours()

    return composed
