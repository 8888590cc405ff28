"""u written once, in the dtype of y: what the stored strategies multiply with.

Cost: reads y (M × K) once and writes u; for K > LONGEST_ROW reads y twice, the first time for the
row statistics. For: layers with more tiles of columns than recomputing u is worth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.triton.competition import exponent_scale, u_of_tile
from ghl_kernels.triton.launch import launch
from ghl_kernels.triton.logsumexp import Statistics, statistics

LONGEST_ROW = 4096
BLOCK_NUMBERS = 4096


@triton.jit
def store_u_kernel(
    y, u, largest, inverse, winner, M, K, y_row, y_column, u_row, scale,
    COMPETITION: tl.constexpr, IN_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = rows < M
    live = inside[:, None] & (k < K)[None, :]
    numbers = tl.load(y + rows[:, None] * y_row + k[None, :] * y_column, live, other=0.0)
    result = u_of_tile(
        numbers, largest, inverse, winner, rows, inside, k, K, scale, COMPETITION, IN_TILE
    )
    tl.store(u + rows[:, None] * u_row + k[None, :], result, live)


def store_u(y: Tensor, competition: str, tau: float, apart: int = 1) -> Tensor:
    """u of y (rows, neurons), its rows at the next multiples of `apart` numbers; y itself where the
    competition is linear."""
    if competition == "linear" or y.shape[0] == 0:
        return y
    rows, neurons = y.shape
    width = -(-neurons // apart) * apart
    u = torch.empty(rows, width, dtype=y.dtype, device=y.device)
    if width > neurons:
        u = u[:, :neurons]
    in_tile = neurons <= LONGEST_ROW
    row_statistics = Statistics(u, u, u) if in_tile else statistics(y, competition, tau)
    block_k = min(triton.next_power_of_2(neurons), LONGEST_ROW)
    block_m = max(1, min(64, BLOCK_NUMBERS // block_k))
    launch(
        store_u_kernel, (triton.cdiv(rows, block_m), triton.cdiv(neurons, block_k)),
        y, u, *row_statistics, rows, neurons, *y.stride(), width, exponent_scale(tau),
        competition, in_tile, block_m, block_k,
    )  # fmt: skip
    return u
