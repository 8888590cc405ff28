"""Split-K: how the rows are divided, the workspace of partial sums, and where their sum goes.

Each split of the rows fills its own part of a float32 workspace, and one kernel adds the parts in
a fixed order. There are no atomics: sign(G) would turn their order into the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ghl_kernels.layout import empty_rows, is_channels_last, like_weight
from ghl_kernels.problem import Problem
from ghl_kernels.tuning.tiles import Tile, programs

FEWEST_BLOCKS = 4  # of rows that a split is worth
STRINGING = 1.08  # times the work of a GPU evenly filled that are worth the parts it takes


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; what the interpreter pretends to have on a CPU."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_rows(problem: Problem, tile: Tile, device: torch.device) -> tuple[int, int]:
    """Number of splits and rows of each, a multiple of the tile's rows; none is empty.

    As many as fill the GPU once, if each has rows enough and the workspace stays below the
    u that a composition of PyTorch's operators would store, with what is held beside it; where u is
    stored here too, that comes on top. Tiles of boxes may be strung together, see `strung_rows`.
    """
    at_once = processors(device) * (1 if tile.resident else tile.programs) // tile.cluster
    wanted = at_once // programs(problem, tile)
    by_rows = problem.rows // (FEWEST_BLOCKS * tile.block_m)
    stored = problem.rows * problem.all_neurons * problem.dtype.itemsize
    by_memory = (stored - problem.held) // (8 * problem.all_neurons * problem.columns)
    splits = max(1, min(wanted, by_rows, by_memory))
    rows = -(-problem.rows // splits)
    rows = -(-rows // tile.block_m) * tile.block_m
    splits = -(-problem.rows // rows)
    strung = strung_rows(problem, tile, at_once) if tile.box and not tile.resident else None
    if strung and strung[0] <= by_memory:
        rounds = -(-programs(problem, tile) * splits // at_once)
        if rounds * rows > STRINGING * strung[1]:
            return strung
    return splits, rows


def strung_rows(problem: Problem, tile: Tile, at_once: int) -> tuple[int, int] | None:
    """Splits and rows of each where what is left of a tile's rows is strung together with that of
    the next (csrc/cuda/sm90_schedule.h), so that every multiprocessor has as much to do; None if
    nothing is left, or if nothing but that: blocks of threads would be at as many places of x, y
    and g, far more than L2 holds. There are more splits than the rows alone would need: that tells
    it. Not every tile has a part in all of them.
    """
    blocks = -(-problem.rows // tile.block_m)
    share = max(FEWEST_BLOCKS, -(-programs(problem, tile) * blocks // at_once))
    whole, rest = divmod(blocks, share)
    if rest == 0 or whole == 0:
        return None
    return whole + 2, share * tile.block_m  # what is left of a tile may be cut once


class Sums(NamedTuple):
    """G, H0: (K, columns), columns in the memory order of the weight; sums of u (K), if they are
    asked for, and, in a result, the number of rows. Or parts of them, (splits, ...)."""

    G: Tensor
    H0: Tensor
    totals: Tensor


@dataclasses.dataclass
class Partials:
    """Where a weight-gradient kernel puts its sums: a part for each split, or the results."""

    splits: int
    rows_per_split: int
    channels_last: bool
    sum_u: bool
    sums: Sums
    results: Sums

    @classmethod
    def empty(cls, problem: Problem, tile: Tile, w: Tensor) -> Partials:
        """Workspace for a weight like w; with one split the results are filled directly."""
        splits, rows = split_rows(problem, tile, w.device)
        G, H0 = empty_rows(w, torch.float32), empty_rows(w, torch.float32)
        count = w.shape[0] + 1 if problem.counted else 0
        totals = torch.empty(count, dtype=torch.float32, device=w.device)
        if problem.counted:
            (totals[-1:] if problem.sum_u else totals).fill_(problem.rows)
        results = sums = Sums(G, H0, totals)
        if splits > 1:
            sizes = G.numel(), H0.numel(), w.shape[0] if problem.sum_u else 0
            parts = (
                torch.empty(splits * size, dtype=torch.float32, device=w.device) for size in sizes
            )
            sums = Sums(*parts)
        return cls(splits, rows, is_channels_last(w), problem.sum_u, sums, results)

    def finish(
        self, w: Tensor, sum_splits: Callable[[Partials], None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """G, H0 and totals with the strides of w; `sum_splits` fills the results from the parts."""
        if self.splits > 1:
            sum_splits(self)
        G, H0, totals = self.results
        return like_weight(G, w, torch.float32), like_weight(H0, w, torch.float32), totals
