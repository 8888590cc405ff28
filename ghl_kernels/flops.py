"""FLOPs of the operators for `torch.utils.flop_counter`, which counts matrix products alone.

A layer's two, G = gᵀx and H₀ = uᵀx, are as many as two weight gradients of backpropagation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def flops_of_layer(
    x: Sequence[int], y: Sequence[int], g: Sequence[int], w: Sequence[int], *rest: Any, **more: Any
) -> int:
    """A multiplication and an addition per product, output position and weight."""
    neurons, *weights_of_one = w
    positions = math.prod(y) // max(neurons, 1)
    return 4 * positions * neurons * math.prod(weights_of_one)


def count(operator: str) -> None:
    """Have PyTorch count the operator of this name, which takes a layer's x, y, g and w."""
    register_flop_formula(getattr(torch.ops.ghl_kernels, operator))(flops_of_layer)
