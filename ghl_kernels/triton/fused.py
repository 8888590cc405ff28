"""The implementation `triton`: u lives only in tiles, whatever the layer.

`kernels` says which kernel a layer takes, and is `stored.py`'s as well.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ghl_kernels import layout, tiles
from ghl_kernels.composed import updates
from ghl_kernels.pairs import Geometry, Kernels, as_it_lies, pairs
from ghl_kernels.problem import Problem
from ghl_kernels.splits import Partials
from ghl_kernels.tiles import Tile
from ghl_kernels.triton.conv_wgrad import conv_wgrad
from ghl_kernels.triton.depthwise_wgrad import depthwise_wgrad
from ghl_kernels.triton.fold import fold_images
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.linear_wgrad import linear_wgrad
from ghl_kernels.triton.logsumexp import logsumexp
from ghl_kernels.triton.merge import merge
from ghl_kernels.triton.split_k import sum_splits

__all__ = ["conv2d_pair", "conv2d_update", "foreach_merge", "linear_pair", "linear_update"]
__all__ += ["logsumexp", "merge"]


def wgrad_of_rows(*arguments: Any) -> None:
    linear_wgrad(*arguments)


def wgrad_of_images(
    geometry: Geometry,
    x: Tensor,
    y: Tensor,
    g: Tensor,
    partials: Partials,
    problem: Problem,
    competition: str,
    tau: float,
    tile: Tile,
) -> None:
    """A convolution's; x (N, C, H, W) in any layout."""
    by_kind = depthwise_wgrad if problem.depthwise else conv_wgrad
    # few channels are read as they lie: the columns of a tile are gathered anyway
    images = x if tile.packed and layout.small_images(x) else layout.as_images(x)
    by_kind(images, y, g, partials, problem, geometry, competition, tau, tile)


def kernels(strategy: str, signal: Any = as_it_lies) -> Kernels:
    """Triton's kernels with the tiles of a strategy."""

    def tile(problem: Problem, w: Tensor) -> Tile:
        return tiles.choose(problem, w.device, strategy).tile

    def folds(problem: Problem, tile: Tile) -> bool:
        return tiles.folds(problem) and not tile.packed

    return Kernels(tile, signal, wgrad_of_rows, wgrad_of_images, sum_splits, folds, fold_images)


linear_pair, conv2d_pair = pairs(kernels("triton"))
linear_update, conv2d_update = updates(linear_pair, conv2d_pair, merge)
