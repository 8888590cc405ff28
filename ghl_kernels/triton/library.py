"""The implementation `library`: u is written once by Triton, both products are cuBLAS's or cuDNN's.

For layers where the library's weight gradient is the fastest, and float32 without TF32.
"""

from __future__ import annotations

from torch import Tensor

from ghl_kernels import composed, layout
from ghl_kernels.composed import Triple
from ghl_kernels.problem import Problem
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.logsumexp import logsumexp
from ghl_kernels.triton.merge import merge
from ghl_kernels.triton.store_u import store_u

__all__ = ["foreach_merge", "logsumexp", "merge", "pair", "update"]


def pair(problem: Problem, x: Tensor, y: Tensor, g: Tensor, w: Tensor, tau: float) -> Triple:
    if problem.rows == 0:
        return composed.no_rows(w)
    u = store_u(layout.as_matrix(y), problem.competition, tau)
    if not problem.linear:
        batch, neurons, height, width = y.shape
        u = u.view(batch, height, width, neurons).movedim(-1, 1)
    return composed.sums(problem, x, u, g, w)


update = composed.update_of(pair, merge)
