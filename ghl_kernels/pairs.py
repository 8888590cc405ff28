"""From a layer's tensors to kernels of a GPU and back: what every implementation there shares.

Activations are brought into matrices, the rows are split, and sums become results like the weight.
Which kernels fill the sums is an implementation's; nothing here launches one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ghl_kernels import composed, layout
from ghl_kernels.composed import Triple
from ghl_kernels.fold import Fold
from ghl_kernels.problem import Problem
from ghl_kernels.splits import Partials
from ghl_kernels.tiles import Tile


class Geometry(NamedTuple):
    """Stride, padding and dilation of a convolution, and the size of its output."""

    pairs: tuple[list[int], list[int], list[int]]
    out_size: tuple[int, int]


class Task(NamedTuple):
    """A layer as the kernels take it: tensors are x, y and g, a rule its competition, tau and
    whether sums of u are wanted; results are like w."""

    problem: Problem
    tile: Tile
    tensors: tuple[Tensor, Tensor, Tensor]
    rule: tuple[str, float, bool]
    w: Tensor


class Kernels(NamedTuple):
    """What an implementation brings.

    tile: the one for a problem on the device of w, and of its strategy. signal: y as a matrix, and
    its competition, as the kernels take them. linear: fills partials from the matrices x, y and g.
    conv: the same from x (N, C, H, W) in any layout, and a geometry. sum_splits: see Partials.
    folds: whether a problem is folded for a tile. fold: copies x for that, as fold.fold_images.
    """

    tile: Callable[[Problem, Tensor], Tile]
    signal: Callable[[Tensor, str, float], tuple[Tensor, str]]
    linear: Callable[..., None]
    conv: Callable[..., None]
    sum_splits: Callable[[Partials], None]
    folds: Callable[[Problem, Tile], bool]
    fold: Callable[..., Tensor]

    def run(self, task: Task, fill: Callable[..., None]) -> Triple:
        """What `fill` makes of a task, in the shape and strides of w."""
        problem, tile, tensors, (competition, tau, sum_u), w = task
        partials = Partials.empty(problem, tile, w, sum_u)
        fill(*tensors, partials, problem, competition, tau, tile)
        return partials.finish(w, self.sum_splits)

    def convolve(self, task: Task, geometry: Geometry) -> Triple:
        """The pair of x (N, C, H, W) and the matrices y and g."""
        return self.run(task, functools.partial(self.conv, geometry))

    def convolve_few(self, task: Task, geometry: Geometry) -> Triple:
        """The same of a layer that is folded; gathered where that would be too large."""
        (x, y, g), w, fold = task.tensors, task.w, Fold.of(task.problem)
        shape = fold.shape(x.shape[0], geometry.out_size)
        if not fold.fits(shape):
            gathering = dataclasses.replace(task.tile, packed=True)
            return self.convolve(task._replace(tile=gathering), geometry)
        buffer = self.fold(x, shape, geometry.pairs[1])
        images = fold.images(buffer, geometry.out_size)
        folded = task._replace(
            problem=fold.folded(held=buffer.numel() * buffer.element_size()),
            tensors=(images, y, g),
            w=fold.weight(w),
        )
        G, H0, totals = self.convolve(folded, Geometry(fold.pairs(), geometry.out_size))
        return fold.unfolded(G, w), fold.unfolded(H0, w), totals


def as_it_lies(y: Tensor, competition: str, tau: float) -> tuple[Tensor, str]:
    """The signal of kernels that make u themselves."""
    return layout.as_matrix(y), competition


def pairs(kernels: Kernels) -> tuple[Callable[..., Triple], Callable[..., Triple]]:
    """linear_pair and conv2d_pair by these kernels. Arguments are already checked."""

    def linear_pair(
        x: Tensor, y: Tensor, g: Tensor, w: Tensor, competition: str, tau: float, sum_u: bool = True
    ) -> Triple:
        if x.numel() == 0:
            return composed.linear_pair(x, y, g, w, competition, tau, sum_u)
        problem = Problem.of_linear(x, w)
        y, competition = kernels.signal(y, competition, tau)
        tensors = layout.as_matrix(x), y, layout.as_matrix(g)
        task = Task(problem, kernels.tile(problem, w), tensors, (competition, tau, sum_u), w)
        return kernels.run(task, kernels.linear)

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
        y, competition = kernels.signal(y, competition, tau)
        if problem.pointwise:
            x = layout.as_matrix(x)
        tensors, tile = (x, y, layout.as_matrix(g)), kernels.tile(problem, w)
        task = Task(problem, tile, tensors, (competition, tau, sum_u), w)
        if problem.pointwise:
            return kernels.run(task, kernels.linear)
        convolve = kernels.convolve_few if kernels.folds(problem, tile) else kernels.convolve
        return convolve(task, geometry)

    return linear_pair, conv2d_pair
