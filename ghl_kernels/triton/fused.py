"""The implementation `triton`: u lives only in tiles, whatever the layer.

`pairs` brings tensors into the kernels' order, and is `stored.py`'s as well. Arguments are already
checked.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ghl_kernels import composed, layout
from ghl_kernels.composed import Triple, updates
from ghl_kernels.problem import Problem
from ghl_kernels.triton import tiles
from ghl_kernels.triton.conv_wgrad import Geometry, conv_wgrad
from ghl_kernels.triton.depthwise_wgrad import depthwise_wgrad
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.linear_wgrad import linear_wgrad
from ghl_kernels.triton.logsumexp import logsumexp
from ghl_kernels.triton.merge import merge
from ghl_kernels.triton.split_k import Partials
from ghl_kernels.triton.store_u import store_u
from ghl_kernels.triton.tiles import Tile

__all__ = ["conv2d_pair", "conv2d_update", "foreach_merge", "linear_pair", "linear_update"]
__all__ += ["logsumexp", "merge"]


def run(
    problem: Problem,
    strategy: str,
    wgrad: Callable[[Partials, Tile], None],
    w: Tensor,
    sum_u: bool,
) -> Triple:
    """What `wgrad` fills with the tile for the layer, in the shape and strides of w."""
    tile = tiles.choose(problem, w.device, strategy).tile
    partials = Partials.empty(problem, tile, w, sum_u)
    wgrad(partials, tile)
    return partials.finish(w)


def pairs(strategy: str, stored: bool) -> tuple[Callable[..., Triple], Callable[..., Triple]]:
    """linear_pair and conv2d_pair of a strategy. `stored`: u is written once and takes the place of
    y, under a competition that is linear; else the kernels make it in their tiles."""

    def signal(y: Tensor, competition: str, tau: float) -> tuple[Tensor, str]:
        rows = layout.as_matrix(y)
        return (store_u(rows, competition, tau), "linear") if stored else (rows, competition)

    def linear_pair(
        x: Tensor, y: Tensor, g: Tensor, w: Tensor, competition: str, tau: float, sum_u: bool = True
    ) -> Triple:
        if x.numel() == 0:
            return composed.linear_pair(x, y, g, w, competition, tau, sum_u)
        problem = Problem.of_linear(x, w)
        y, competition = signal(y, competition, tau)
        x, g = layout.as_matrix(x), layout.as_matrix(g)

        def wgrad(partials: Partials, tile: Tile) -> None:
            linear_wgrad(x, y, g, partials, problem, competition, tau, tile)

        return run(problem, strategy, wgrad, w, sum_u)

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
        if problem.rows == 0:
            return composed.no_rows(w)
        geometry = Geometry((stride, padding, dilation), (y.shape[2], y.shape[3]))
        y, competition = signal(y, competition, tau)
        g = layout.as_matrix(g)

        def wgrad(partials: Partials, tile: Tile) -> None:
            if problem.pointwise:
                rows = layout.as_matrix(x)
                return linear_wgrad(rows, y, g, partials, problem, competition, tau, tile)
            by_kind = depthwise_wgrad if problem.depthwise else conv_wgrad
            # few channels are read as they lie: the columns of a tile are gathered anyway
            as_it_lies = tile.packed and layout.small_images(x)
            images = x if as_it_lies else layout.as_images(x)
            return by_kind(images, y, g, partials, problem, geometry, competition, tau, tile)

        return run(problem, strategy, wgrad, w, sum_u)

    return linear_pair, conv2d_pair


linear_pair, conv2d_pair = pairs("triton", stored=False)
linear_update, conv2d_update = updates(linear_pair, conv2d_pair, merge)
