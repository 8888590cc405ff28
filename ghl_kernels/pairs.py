"""From a layer's tensors to kernels of a GPU and back: what every implementation there shares.

Activations are brought into matrices, the rows are split, and sums become results like the weight.
Which kernels fill the sums is an implementation's; nothing here launches one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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

    def run(
        self,
        problem: Problem,
        tile: Tile,
        fill: Callable[..., None],
        tensors: tuple,
        rule: tuple,
        w: Tensor,
    ) -> Triple:
        """What `fill` makes of the tensors, in the shape and strides of w."""
        competition, tau, sum_u = rule
        partials = Partials.empty(problem, tile, w, sum_u)
        fill(*tensors, partials, problem, competition, tau, tile)
        return partials.finish(w, self.sum_splits)

    def convolve(
        self,
        problem: Problem,
        tile: Tile,
        geometry: Geometry,
        tensors: tuple,
        rule: tuple,
        w: Tensor,
    ) -> Triple:
        """The pair of x (N, C, H, W) and the matrices y and g."""

        def fill(*arguments: Any) -> None:
            self.conv(geometry, *arguments)

        return self.run(problem, tile, fill, tensors, rule, w)

    def convolve_few(
        self,
        problem: Problem,
        tile: Tile,
        geometry: Geometry,
        tensors: tuple,
        rule: tuple,
        w: Tensor,
    ) -> Triple:
        """The same of a layer that is folded; gathered where that would be too large."""
        (x, y, g), fold = tensors, Fold.of(problem)
        shape = fold.shape(x.shape[0], geometry.out_size)
        if not fold.fits(shape):
            gathering = dataclasses.replace(tile, packed=True)
            return self.convolve(problem, gathering, geometry, tensors, rule, w)
        buffer = self.fold(x, shape, geometry.pairs[1])
        images = fold.images(buffer, geometry.out_size)
        folded = fold.folded(held=buffer.numel() * buffer.element_size())
        geometry = Geometry(fold.pairs(), geometry.out_size)
        G, H0, totals = self.convolve(folded, tile, geometry, (images, y, g), rule, fold.weight(w))
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
        tile, rule = kernels.tile(problem, w), (competition, tau, sum_u)
        return kernels.run(problem, tile, kernels.linear, tensors, rule, w)

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
        g = layout.as_matrix(g)
        tile, rule = kernels.tile(problem, w), (competition, tau, sum_u)
        if problem.pointwise:
            matrices = layout.as_matrix(x), y, g
            return kernels.run(problem, tile, kernels.linear, matrices, rule, w)
        convolve = kernels.convolve_few if kernels.folds(problem, tile) else kernels.convolve
        return convolve(problem, tile, geometry, (x, y, g), rule, w)

    return linear_pair, conv2d_pair
