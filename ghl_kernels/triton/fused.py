"""The implementation `triton`: u lives only in tiles, whatever the layer.

`run_linear` and `run_conv2d` bring tensors into the kernels' order; `stored.py` uses them with a u
that is already there. Arguments are already checked.
"""

from __future__ import annotations

from torch import Tensor

from ghl_kernels import composed, layout
from ghl_kernels.composed import Triple, no_rows, updates
from ghl_kernels.problem import Problem
from ghl_kernels.triton import tiles
from ghl_kernels.triton.conv_wgrad import conv_wgrad
from ghl_kernels.triton.depthwise_wgrad import depthwise_wgrad
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.linear_wgrad import linear_wgrad
from ghl_kernels.triton.logsumexp import logsumexp
from ghl_kernels.triton.merge import merge
from ghl_kernels.triton.split_k import Partials

__all__ = ["conv2d_pair", "conv2d_update", "foreach_merge", "linear_pair", "linear_update"]
__all__ += ["logsumexp", "merge"]


def run_linear(
    problem: Problem,
    x: Tensor,
    y: Tensor,
    g: Tensor,
    w: Tensor,
    competition: str,
    tau: float,
    sum_u: bool,
    strategy: str,
) -> Triple:
    """The pair of x (M, C), y and g (M, K), matrices, in the shape and strides of w."""
    if problem.rows == 0:
        return no_rows(w)
    tile = tiles.choose(problem, x.device, strategy).tile
    partials = Partials.empty(problem, tile, w, sum_u)
    linear_wgrad(x, y, g, partials, problem, competition, tau, tile)
    return partials.finish(w)


def run_conv2d(
    problem: Problem,
    x: Tensor,
    y: Tensor,
    g: Tensor,
    w: Tensor,
    geometry: tuple[list[int], list[int], list[int]],
    out_size: tuple[int, int],
    competition: str,
    tau: float,
    sum_u: bool,
    strategy: str,
) -> Triple:
    """The pair of x (N, C, H, W) and y and g as matrices (M, K), by the kernel for the layer."""
    if problem.pointwise:
        x = layout.as_matrix(x)
        return run_linear(problem, x, y, g, w, competition, tau, sum_u, strategy)
    if problem.rows == 0:
        return no_rows(w)
    tile = tiles.choose(problem, x.device, strategy).tile
    partials = Partials.empty(problem, tile, w, sum_u)
    wgrad = depthwise_wgrad if problem.depthwise else conv_wgrad
    # few channels are read as they lie: the columns of a tile are gathered anyway
    x = x if tile.packed and layout.small_images(x) else layout.as_images(x)
    wgrad(x, y, g, partials, problem, geometry, out_size, competition, tau, tile)
    return partials.finish(w)


def linear_pair(
    x: Tensor, y: Tensor, g: Tensor, w: Tensor, competition: str, tau: float, sum_u: bool = True
) -> Triple:
    if x.numel() == 0:
        return composed.linear_pair(x, y, g, w, competition, tau, sum_u)
    problem = Problem.of_linear(x, w)
    x, y, g = (layout.as_matrix(t) for t in (x, y, g))
    return run_linear(problem, x, y, g, w, competition, tau, sum_u, "triton")


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
    y, g = layout.as_matrix(y), layout.as_matrix(g)
    return run_conv2d(problem, x, y, g, w, geometry, out_size, competition, tau, sum_u, "triton")


linear_update, conv2d_update = updates(linear_pair, conv2d_pair, merge)
