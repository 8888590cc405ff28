"""From a layer's tensors to kernels of a GPU and back: what all with products of their own share.

Activations are brought into matrices, the rows are split, and sums become results like the weight.
Which kernels fill the sums is an implementation's; nothing here launches one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ghl_kernels import composed, layout
from ghl_kernels.composed import Triple
from ghl_kernels.fold import Fold, fold_images
from ghl_kernels.problem import Problem
from ghl_kernels.splits import Partials
from ghl_kernels.tuning.tiles import Tile


class Task(NamedTuple):
    """A layer as the kernels take it.

    x: a matrix (M, C), or the images of a convolution that is not pointwise. y, g: matrices (M, K).
    out_size: the height and width of an image of y. competition: linear where y is a stored u.
    """

    problem: Problem
    tile: Tile
    x: Tensor
    y: Tensor
    g: Tensor
    competition: str
    tau: float
    out_size: tuple[int, int] = (1, 1)


Fill = Callable[[Task, Partials], None]


def never(problem: Problem, tile: Tile) -> bool:
    return False


class Kernels(NamedTuple):
    """What an implementation brings.

    tile: the one for a problem on the device of w, and of its strategy. signal: y as a matrix, and
    its competition, as the kernels take them. linear, conv: fill partials of matrices, and of
    images in any layout. sum_splits: see Partials. folds: whether a problem is folded for a tile.
    fold: copies x for that, as fold.fold_images does by PyTorch's operators.
    """

    tile: Callable[[Problem, Tensor], Tile]
    signal: Callable[[Tensor, str, float], tuple[Tensor, str]]
    linear: Fill
    conv: Fill
    sum_splits: Callable[[Partials], None]
    folds: Callable[[Problem, Tile], bool] = never
    fold: Callable[..., Tensor] = fold_images

    def run(self, task: Task, w: Tensor, fill: Fill) -> Triple:
        """What `fill` makes of a task, in the shape and strides of w."""
        partials = Partials.empty(task.problem, task.tile, w)
        fill(task, partials)
        return partials.finish(w, self.sum_splits)

    def convolve_few(self, task: Task, w: Tensor) -> Triple:
        """The pair of a layer that is folded; gathered where that would be too large."""
        fold = Fold.of(task.problem)
        shape = fold.shape(task.x.shape[0], task.out_size)
        if not fold.fits(shape):
            gathering = dataclasses.replace(task.tile, packed=True)
            return self.run(task._replace(tile=gathering), w, self.conv)
        buffer = self.fold(task.x, shape, task.problem.padding)
        folded = task._replace(
            problem=fold.folded(held=buffer.numel() * buffer.element_size()),
            x=fold.images(buffer, task.out_size),
        )
        G, H0, totals = self.run(folded, fold.weight(w), self.conv)
        return fold.unfolded(G, w), fold.unfolded(H0, w), totals


def as_it_lies(y: Tensor, competition: str, tau: float) -> tuple[Tensor, str]:
    """The signal of kernels that make u themselves."""
    return layout.as_matrix(y), competition


def pair_by(kernels: Kernels) -> Callable[..., Triple]:
    """The pair of an implementation, by these kernels."""

    def pair(problem: Problem, x: Tensor, y: Tensor, g: Tensor, w: Tensor, tau: float) -> Triple:
        if problem.rows == 0 or problem.columns == 0:
            return composed.pair(problem, x, y, g, w, tau)
        tile = kernels.tile(problem, w)
        signal, competition = kernels.signal(y, problem.competition, tau)
        if problem.pointwise:
            x = layout.as_matrix(x)
        task = Task(problem, tile, x, signal, layout.as_matrix(g), competition, tau)
        if problem.pointwise:
            return kernels.run(task, w, kernels.linear)
        task = task._replace(out_size=(y.shape[2], y.shape[3]))
        if kernels.folds(problem, tile):
            return kernels.convolve_few(task, w)
        return kernels.run(task, w, kernels.conv)

    return pair
