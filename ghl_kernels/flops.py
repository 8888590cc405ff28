"""FLOPs of the operators that take activations, for `torch.utils.flop_counter`.

As PyTorch's own formulas they count matrix products alone, and a layer has two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ghl_kernels.ops import NO_GRAD, TAKES_ACTIVATIONS


def of_layer(
    x: Sequence[int], y: Sequence[int], g: Sequence[int], w: Sequence[int], *rest: Any, **more: Any
) -> int:
    """FLOPs of G = gᵀx and H₀ = uᵀx, of shapes: two per weight and position each.

    They are as many as two weight gradients of backpropagation have.
    """
    neurons, *weights_of_one = w
    positions = math.prod(y) // max(neurons, 1)
    return 4 * positions * neurons * math.prod(weights_of_one)


@functools.cache
def register() -> None:
    """Have every FlopCounterMode from now on count pairs and updates, those of layers too.

    `import ghl_kernels` does not: PyTorch's counter takes long to import, for it imports Triton.
    """
    from torch.utils.flop_counter import register_flop_formula

    names = [*TAKES_ACTIVATIONS, *(NO_GRAD[n] for n in TAKES_ACTIVATIONS if n in NO_GRAD)]
    register_flop_formula([getattr(torch.ops.ghl_kernels, name) for name in names])(of_layer)
