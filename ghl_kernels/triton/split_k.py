"""Split-K: how the rows are divided, the workspace of partial sums, and their sum.

Each split of the rows fills its own part of a float32 workspace, and one kernel adds the parts in
the order of the splits. There are no atomics: sign(G) would turn their order into the result.
Cost of the sum: reads splits × 2·K·C float32 numbers, which at one wave of programs lie in the L2
cache, and writes 2·K·C.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.layout import empty_rows, is_channels_last, like_weight
from ghl_kernels.problem import Problem
from ghl_kernels.triton.tiles import ALIGNED, Tile, programs

FEWEST_BLOCKS = 4  # of rows that a split is worth
BLOCK_NUMBERS = 128
MOST_SPLITS_AT_ONCE = 64
SMALL_TILE = 16, 128, 64  # rows, neurons, inputs


def dot_precision(problem: Problem) -> str:
    """tf32 for float32 only where torch.backends allows it; 16-bit products do not ask."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if problem.linear else backends.cudnn.conv
    allowed = problem.dtype != torch.float32 or backend.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def loads_wide(t: Tensor) -> bool:
    """Whether the compiler can load several neighbouring numbers of t at once."""
    multiples = all(stride % ALIGNED == 0 for stride in t.stride() if stride != 1)
    return t.data_ptr() % 16 == 0 and multiples and 1 in t.stride()


def without_spills(tile: Tile, problem: Problem, *tensors: Tensor) -> Tile:
    """The tile; a smaller one where numbers wait in registers for the product.

    They do if 16-bit numbers are loaded one by one, and in a product that is no tensor core's.
    """
    sizes = problem.neurons % ALIGNED == 0 and problem.channels % ALIGNED == 0
    wide = sizes or (tile.packed and problem.neurons % ALIGNED == 0)
    wide = problem.dtype == torch.float32 or (wide and all(map(loads_wide, tensors)))
    if wide and dot_precision(problem) != "ieee":
        return tile
    sides = zip((tile.block_m, tile.block_k, tile.block_c), SMALL_TILE, strict=True)
    block_m, block_k, block_c = (min(pair) for pair in sides)
    return dataclasses.replace(tile, block_m=block_m, block_k=block_k, block_c=block_c)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; what the interpreter pretends to have on a CPU."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_rows(problem: Problem, tile: Tile, device: torch.device) -> tuple[int, int]:
    """Number of splits and rows of each, a multiple of the tile's rows; none is empty.

    As many as fill the GPU once, if each has rows enough and the workspace stays below the
    u that a composition of PyTorch's operators would store.
    """
    wanted = processors(device) * tile.programs // programs(problem, tile)
    by_rows = problem.rows // (FEWEST_BLOCKS * tile.block_m)
    stored = problem.rows * problem.all_neurons * problem.dtype.itemsize
    by_memory = stored // (8 * problem.all_neurons * problem.columns)
    splits = max(1, min(wanted, by_rows, by_memory))
    rows = triton.cdiv(triton.cdiv(problem.rows, splits), tile.block_m) * tile.block_m
    return triton.cdiv(problem.rows, rows), rows


@dataclasses.dataclass
class Partials:
    """Where a weight-gradient kernel puts its sums: a part for each split, or the results.

    G, H0: (splits, K, columns), columns in the memory order of the weight; u_sums (splits, K).
    """

    splits: int
    rows_per_split: int
    channels_last: bool
    sum_u: bool
    sums: tuple[Tensor, Tensor, Tensor]
    results: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def empty(cls, problem: Problem, tile: Tile, w: Tensor, sum_u: bool) -> Partials:
        """Workspace for a weight like w; with one split the results are filled directly."""
        splits, rows = split_rows(problem, tile, w.device)
        G, H0 = empty_rows(w, torch.float32), empty_rows(w, torch.float32)
        totals = torch.empty(w.shape[0] + 1, dtype=torch.float32, device=w.device)
        totals[-1:].fill_(problem.rows)
        if not sum_u:
            totals[:-1].fill_(0)
        results = sums = G, H0, totals
        if splits > 1:
            sizes = G.numel(), H0.numel(), w.shape[0]
            G, H0, totals = (
                torch.empty(splits * size, dtype=torch.float32, device=w.device) for size in sizes
            )
            sums = G, H0, totals
        return cls(splits, rows, is_channels_last(w), sum_u, sums, results)

    def finish(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G, H0 and totals, summed over the splits in their order, with the strides of w."""
        G, H0, totals = self.results
        if self.splits > 1:
            at_once = min(triton.next_power_of_2(self.splits), MOST_SPLITS_AT_ONCE)
            sum_splits_kernel[(triton.cdiv(G.numel(), BLOCK_NUMBERS), 3 if self.sum_u else 2)](
                *self.sums, *self.results, G.numel(), w.shape[0], self.splits,
                at_once, BLOCK_NUMBERS,
            )  # fmt: skip
        return like_weight(G, w, torch.float32), like_weight(H0, w, torch.float32), totals


@triton.jit
def sum_splits_kernel(
    G_parts, H0_parts, u_parts, G, H0, u_sums, numbers, neurons, splits,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    parts, result, count = G_parts, G, numbers
    if tl.program_id(1) == 1:
        parts, result = H0_parts, H0
    if tl.program_id(1) == 2:
        parts, result, count = u_parts, u_sums, neurons
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, AT_ONCE)
    total = tl.zeros((AT_ONCE, BLOCK), tl.float32)
    for first in range(0, splits, AT_ONCE):
        inside = (first + split < splits)[:, None] & (at < count)[None, :]
        offsets = (first + split).to(tl.int64)[:, None] * count + at[None, :]
        total += tl.load(parts + offsets, inside, other=0.0)
    tl.store(result + at, tl.sum(total, 0), at < count)
