"""The sum of the splits' parts, in a fixed order, and what loads of numbers one by one do to tiles.

Cost of the sum: reads splits × 2·K·C float32 numbers, which at one wave of programs lie in the L2
cache, and writes 2·K·C.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.problem import Problem, dot_precision
from ghl_kernels.splits import Partials
from ghl_kernels.triton.launch import launch
from ghl_kernels.tuning.tiles import ALIGNED, Tile

BLOCK_NUMBERS = 128
MOST_SPLITS_AT_ONCE = 64
SMALL_TILE = 16, 128, 64  # rows, neurons, inputs


def loads_wide(t: Tensor) -> bool:
    """Whether the compiler can load several neighbouring numbers of t at once."""
    multiples = all(stride % ALIGNED == 0 for stride in t.stride() if stride != 1)
    return t.data_ptr() % 16 == 0 and multiples and 1 in t.stride()


def in_units(x: Tensor) -> int:
    """The unit of the strides of images (N, C, H, W) with which the compiler sees wide loads.

    It knows a stride's divisibility by 16 alone. Strides that are multiples of 16 bytes only, as
    those of a folded x, it is told in units of so many numbers; any others in units of 1.
    """
    unit = 16 // x.element_size()
    apart = [stride for dim, stride in enumerate(x.stride()) if dim != 1]
    wide = x.data_ptr() % 16 == 0 and x.stride(1) == 1 and x.shape[1] % ALIGNED == 0
    wide = wide and all(stride % unit == 0 for stride in apart)
    return unit if wide and any(stride % ALIGNED for stride in apart) else 1


def without_spills(tile: Tile, problem: Problem, *tensors: Tensor) -> Tile:
    """The tile; a smaller one where numbers wait in registers for the product.

    They do if 16-bit numbers are loaded one by one, and in a product that is no tensor core's.
    """
    sizes = problem.neurons % ALIGNED == 0 and problem.channels % ALIGNED == 0
    wide = sizes or (tile.packed and problem.neurons % ALIGNED == 0)
    wide = problem.dtype.itemsize == 4 or (wide and all(map(loads_wide, tensors)))
    if wide and dot_precision(problem) != "ieee":
        return tile
    sides = zip((tile.block_m, tile.block_k, tile.block_c), SMALL_TILE, strict=True)
    block_m, block_k, block_c = (min(pair) for pair in sides)
    return dataclasses.replace(tile, block_m=block_m, block_k=block_k, block_c=block_c)


def sum_splits(partials: Partials) -> None:
    """Fill the results with the parts, added in a fixed order."""
    G, neurons = partials.results.G, partials.results.G.shape[0]
    at_once = min(triton.next_power_of_2(partials.splits), MOST_SPLITS_AT_ONCE)
    launch(
        sum_splits_kernel, (triton.cdiv(G.numel(), BLOCK_NUMBERS), 3 if partials.sum_u else 2),
        *partials.sums, *partials.results, G.numel(), neurons, partials.splits,
        at_once, BLOCK_NUMBERS,
    )  # fmt: skip


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
