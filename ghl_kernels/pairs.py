"""From a layer's tensors to kernels of a GPU and back: what every implementation there shares.

Activations are brought into matrices, the rows are split, and sums become results like the weight.
Which kernels fill the sums is an implementation's; nothing here launches one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ghl_kernels import composed, layout
from ghl_kernels.composed import Triple
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
    """

    tile: Callable[[Problem, Tensor], Tile]
    signal: Callable[[Tensor, str, float], tuple[Tensor, str]]
    linear: Callable[..., None]
    conv: Callable[..., None]
    sum_splits: Callable[[Partials], None]

    def run(
        self, problem: Problem, fill: Callable[..., None], tensors: tuple, rule: tuple, w: Tensor
    ) -> Triple:
        """What `fill` makes of the tensors, in the shape and strides of w."""
        competition, tau, sum_u = rule
        tile = self.tile(problem, w)
        partials = Partials.empty(problem, tile, w, sum_u)
        fill(*tensors, partials, problem, competition, tau, tile)
        return partials.finish(w, self.sum_splits)


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
        return kernels.run(problem, kernels.linear, tensors, (competition, tau, sum_u), w)

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
        rule = competition, tau, sum_u
        if problem.pointwise:
            return kernels.run(problem, kernels.linear, (layout.as_matrix(x), y, g), rule, w)

        def conv(*arguments: Any) -> None:
            kernels.conv(geometry, *arguments)

        return kernels.run(problem, conv, (x, y, g), rule, w)

    return linear_pair, conv2d_pair
