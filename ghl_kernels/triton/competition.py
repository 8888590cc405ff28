"""u from a tile of y, in registers: the device code that every kernel shares.

The statistics of a row are its largest y, 1 / sum(exp((y - largest) / tau)), and its winner, the
first neuron with the largest y. Keeping the largest apart keeps u exact where y / tau is large.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl


def exponent_scale(tau: float) -> float:
    """What (y - largest) is multiplied by to be an exponent of 2; finite in float32."""
    return min(math.log2(math.e) / tau, torch.finfo(torch.float32).max)


@triton.jit
def finite(largest):
    """What exponents are taken relative to: 0 where a row has no finite largest number."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit
def row_sums(y, columns, scale, COMPETITION: tl.constexpr):
    """largest y, sum of exponentials relative to it, winner of each row, and the exponentials.

    y (rows, neurons) in float32, -inf beyond the last neuron; columns are the neurons' numbers.
    A `hard` competition needs no exponentials: the sum is 1, or NaN as soon as a y is.
    """
    largest = tl.max(y, 1)
    if COMPETITION == "hard":
        powers = y
        total = 1.0 + tl.sum(tl.where(y == y, 0.0, y), 1)
    else:
        powers = tl.exp2((y - finite(largest)[:, None]) * scale)
        total = tl.sum(powers, 1)
    if COMPETITION == "softmax":
        winner = tl.zeros_like(largest).to(tl.int32)
    else:
        winner = tl.min(tl.where(y == largest[:, None], columns[None, :], 2147483647), 1)
    return largest, total, winner, powers


@triton.jit
def inverse_of(total, largest, COMPETITION: tl.constexpr):
    """1 / total; NaN where softmax is NaN because the largest y is infinite."""
    if COMPETITION == "hard":
        return total
    return 1.0 / total + (largest - largest)


@triton.jit
def compete(powers, inverse, winner, columns, COMPETITION: tl.constexpr):
    """u in float32 (rows, neurons) of exponentials relative to the largest y of their row."""
    wins = columns[None, :] == winner[:, None]
    if COMPETITION == "hard":
        u = tl.where(wins, inverse[:, None], inverse[:, None] - 1.0)
    else:
        u = powers * inverse[:, None]
        if COMPETITION == "softhebb":
            u = tl.where(wins, u, -u)
    return u


@triton.jit
def u_of_tile(
    y, largest, inverse, winner, rows, inside, columns, K, scale,
    COMPETITION: tl.constexpr, IN_TILE: tl.constexpr,
):  # fmt: skip
    """u in the dtype of y for a tile of y; IN_TILE: it holds whole rows, else the statistics are
    read from where the kernel of `logsumexp.py` stored those of `rows`."""
    if COMPETITION == "linear":
        u = y
    else:
        numbers = tl.where((columns < K)[None, :], y.to(tl.float32), float("-inf"))
        if IN_TILE:
            top, total, first, powers = row_sums(numbers, columns, scale, COMPETITION)
            share = inverse_of(total, top, COMPETITION)
        else:
            top = tl.load(largest + rows, inside, other=0.0)
            share = tl.load(inverse + rows, inside, other=0.0)
            if COMPETITION == "softmax":
                first = tl.zeros_like(top).to(tl.int32)
            else:
                first = tl.load(winner + rows, inside, other=0)
            powers = tl.exp2((numbers - top[:, None]) * scale)
        u = compete(powers, share, first, columns, COMPETITION).to(y.dtype)
    return u
