"""The statistics of each row of y, and its log-sum-exp.

Cost: reads y (rows × neurons) once, writes 4 to 12 bytes a row; about four operations a number.
For: rows of any length; more than LONGEST_BLOCK neurons are walked with a running maximum and sum.
y is (outer, neurons, inner), so that NCHW and channels_last are both read as they lie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.triton.competition import exponent_scale, finite, inverse_of, row_sums
from ghl_kernels.triton.launch import launch

BLOCK_NUMBERS = 4096
LONGEST_BLOCK = 4096


class Statistics(NamedTuple):
    """Of each row: the largest y, 1 / sum(exp((y - largest) / tau)), the first largest neuron."""

    largest: Tensor
    inverse: Tensor
    winner: Tensor


@triton.jit
def statistics_kernel(
    y, largest, inverse, winner,
    rows, K, inner, outer_stride, neuron_stride, inner_stride, scale,
    COMPETITION: tl.constexpr, LOGSUMEXP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    y += (row // inner * outer_stride + row % inner * inner_stride)[:, None]
    columns = tl.arange(0, BLOCK_K)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.zeros((BLOCK_M,), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + columns
        numbers = tl.load(
            y + k[None, :].to(tl.int64) * neuron_stride,
            inside[:, None] & (k < K)[None, :],
            other=float("-inf"),
        )
        top_here, total_here, first_here, _ = row_sums(
            numbers.to(tl.float32), k, scale, COMPETITION
        )
        highest = tl.maximum(top, top_here)
        if COMPETITION == "hard":
            total = tl.where(total == 0.0, total_here, total * total_here)
        else:
            before = tl.exp2((finite(top) - finite(highest)) * scale)
            here = tl.exp2((finite(top_here) - finite(highest)) * scale)
            # no terms yet: 0 times an exponential that may have overflowed
            total = tl.where(total == 0.0, 0.0, total * before)
            total += tl.where(total_here == 0.0, 0.0, total_here * here)
        first = tl.where(top_here > top, first_here, first)
        top = highest
    if LOGSUMEXP:
        tl.store(largest + row, (finite(top) * scale + tl.log2(total)) * 0.6931471805599453, inside)
    else:
        tl.store(largest + row, top, inside)
        tl.store(inverse + row, inverse_of(total, top, COMPETITION), inside)
        if COMPETITION != "softmax":
            tl.store(winner + row, first, inside)


def fill(y: Tensor, results: Statistics, competition: str, tau: float, lse: bool) -> None:
    """Fill results (outer × inner,) from y (outer, neurons, inner), which has any strides."""
    outer, neurons, inner = y.shape
    if outer * inner == 0:
        return
    block_k = min(triton.next_power_of_2(neurons), LONGEST_BLOCK)
    block_m = max(1, min(64, BLOCK_NUMBERS // block_k))
    launch(
        statistics_kernel, (triton.cdiv(outer * inner, block_m),),
        y, *results, outer * inner, neurons, inner, *y.stride(), exponent_scale(tau),
        competition, lse, block_m, block_k,
    )  # fmt: skip


def statistics(y: Tensor, competition: str, tau: float) -> Statistics:
    """Of the rows of y (rows, neurons): what `u_of_tile` reads when a tile is not a whole row."""
    largest, inverse = torch.empty(2, y.shape[0], dtype=torch.float32, device=y.device)
    winner = largest if competition == "softmax" else torch.empty_like(largest, dtype=torch.int32)
    results = Statistics(largest, inverse, winner)
    fill(y[:, :, None], results, competition, tau, lse=False)
    return results


def logsumexp(y: Tensor, tau: float, dim: int) -> Tensor:
    """The operator: log of the sum of exp(y / tau) along `dim`, in float32."""
    dim %= y.dim()
    outer, inner = y.shape[:dim].numel(), y.shape[dim + 1 :].numel()
    lse = torch.empty([*y.shape[:dim], *y.shape[dim + 1 :]], dtype=torch.float32, device=y.device)
    rows = y.reshape(outer, y.shape[dim], inner)
    fill(rows, Statistics(lse, lse, lse), "softmax", tau, lse=True)
    return lse
