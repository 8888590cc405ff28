"""The implementation `library`: u is written once by Triton, both products are cuBLAS's or cuDNN's.

For layers where the library's weight gradient is the fastest, and float32 without TF32.
"""

from __future__ import annotations

from torch import Tensor

from ghl_kernels import composed, layout
from ghl_kernels.composed import Triple, updates
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.logsumexp import logsumexp
from ghl_kernels.triton.merge import merge
from ghl_kernels.triton.store_u import store_u

__all__ = ["conv2d_pair", "conv2d_update", "foreach_merge", "linear_pair", "linear_update"]
__all__ += ["logsumexp", "merge"]


def linear_pair(
    x: Tensor, y: Tensor, g: Tensor, w: Tensor, competition: str, tau: float, sum_u: bool = True
) -> Triple:
    u = store_u(layout.as_matrix(y), competition, tau)
    return composed.linear_pair(x, u, g, w, "linear", tau, sum_u)


def conv2d_pair(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    competition: str,
    tau: float,
    sum_u: bool = True,
) -> Triple:
    batch, neurons, height, width = y.shape
    rows = store_u(layout.as_matrix(y), competition, tau)
    u = rows.view(batch, height, width, neurons).movedim(-1, 1)
    geometry = stride, padding, dilation, groups
    return composed.conv2d_pair(x, u, g, w, *geometry, "linear", tau, sum_u)


linear_update, conv2d_update = updates(linear_pair, conv2d_pair, merge)
