"""The implementation `triton`: u lives only in tiles, whatever the layer.

`kernels` says which kernel a layer takes, and is `stored.py`'s as well.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ghl_kernels import layout
from ghl_kernels.composed import update_of
from ghl_kernels.pairs import Kernels, Task, as_it_lies, pair_by
from ghl_kernels.problem import Problem
from ghl_kernels.splits import Partials
from ghl_kernels.triton.conv_wgrad import conv_wgrad
from ghl_kernels.triton.depthwise_wgrad import depthwise_wgrad
from ghl_kernels.triton.fold import fold_images
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.linear_wgrad import linear_wgrad
from ghl_kernels.triton.logsumexp import logsumexp
from ghl_kernels.triton.merge import merge
from ghl_kernels.triton.split_k import sum_splits
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import Tile

__all__ = ["foreach_merge", "logsumexp", "merge", "pair", "update"]


def wgrad_of_images(task: Task, partials: Partials) -> None:
    by_kind = depthwise_wgrad if task.problem.depthwise else conv_wgrad
    # few channels are read as they lie: the columns of a tile are gathered anyway
    as_they_lie = task.tile.packed and layout.small_images(task.x)
    by_kind(task if as_they_lie else task._replace(x=layout.as_images(task.x)), partials)


def kernels(strategy: str, signal: Any = as_it_lies) -> Kernels:
    """Triton's kernels with the tiles of a strategy."""

    def tile(problem: Problem, w: Tensor) -> Tile:
        return tiles.choose(problem, w.device, strategy).tile

    def folds(problem: Problem, tile: Tile) -> bool:
        return tiles.folds(problem) and not tile.packed

    return Kernels(tile, signal, linear_wgrad, wgrad_of_images, sum_splits, folds, fold_images)


pair = pair_by(kernels("triton"))
update = update_of(pair, merge)
