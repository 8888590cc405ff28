"""The sum of the splits' parts, in a fixed order.

Cost of the sum: reads splits × 2·K·C float32 numbers, which at one wave of programs lie in the L2
cache, and writes 2·K·C.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ghl_kernels.splits import Partials
from ghl_kernels.triton.launch import launch

BLOCK_NUMBERS = 128
MOST_SPLITS_AT_ONCE = 64


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
