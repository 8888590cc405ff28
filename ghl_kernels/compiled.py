"""What calls into compiled libraries share, whichever device they are for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ghl_kernels import composed
from ghl_kernels.checks import sum_dtype
from ghl_kernels.rule import CHOICES

MOST_ROWS = 2**31 - 2**16  # counted in 32 bits, and a step beyond


def code(argument: str, value: str) -> int:
    """The position of a choice in its vocabulary: how csrc/rule.h numbers it."""
    return CHOICES[argument].index(value)


def logsumexp_by(overload: str) -> Callable[[Tensor, float, int], Tensor]:
    """The operator logsumexp by a compiled overload of it."""

    def logsumexp(y: Tensor, tau: float, dim: int) -> Tensor:
        dim %= y.dim()
        outer, inner = y.shape[:dim].numel(), y.shape[dim + 1 :].numel()
        if outer * inner > MOST_ROWS:
            return composed.logsumexp(y, tau, dim)
        rows = [*y.shape[:dim], *y.shape[dim + 1 :]]
        lse = torch.empty(rows, dtype=sum_dtype(y.dtype), device=y.device)
        compiled = getattr(torch.ops.ghl_kernels.logsumexp, overload)
        compiled(y.reshape(outer, y.shape[dim], inner, 1), lse, tau)
        return lse

    return logsumexp
