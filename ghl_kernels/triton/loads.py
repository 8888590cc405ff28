"""How wide a kernel's loads can be of tensors as they lie, and what that does to its tile."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ghl_kernels.problem import Problem, dot_precision
from ghl_kernels.tuning.tiles import ALIGNED, Tile

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
