"""The implementation `triton_stored`: u is written once, in the dtype of y, and read by tiles.

For layers with so many columns that u would be made again many times.
"""

from __future__ import annotations

from torch import Tensor

from ghl_kernels import composed, layout
from ghl_kernels.composed import Triple, updates
from ghl_kernels.problem import Problem
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.fused import run_conv2d, run_linear
from ghl_kernels.triton.logsumexp import logsumexp
from ghl_kernels.triton.merge import merge
from ghl_kernels.triton.store_u import store_u

__all__ = ["conv2d_pair", "conv2d_update", "foreach_merge", "linear_pair", "linear_update"]
__all__ += ["logsumexp", "merge"]


def linear_pair(
    x: Tensor, y: Tensor, g: Tensor, w: Tensor, competition: str, tau: float, sum_u: bool = True
) -> Triple:
    if x.numel() == 0:
        return composed.linear_pair(x, y, g, w, competition, tau, sum_u)
    problem = Problem.of_linear(x, w)
    x, y, g = (layout.as_matrix(t) for t in (x, y, g))
    u = store_u(y, competition, tau)
    return run_linear(problem, x, u, g, w, "linear", tau, sum_u, "triton_stored")


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
    problem = Problem.of_conv2d(x, y, g, w, stride, padding, dilation, groups)
    geometry, out_size = (stride, padding, dilation), (y.shape[2], y.shape[3])
    u, g = store_u(layout.as_matrix(y), competition, tau), layout.as_matrix(g)
    return run_conv2d(
        problem, x, u, g, w, geometry, out_size, "linear", tau, sum_u, "triton_stored"
    )


linear_update, conv2d_update = updates(linear_pair, conv2d_pair, merge)
