"""The merge: from G, H0 and totals to the update of a layer and its statistics.

Cost: reads G, H0 and w (K × columns each) twice, the second time from L2 where they fit, and
writes the update once; two launches. The first finds each neuron's decay, <G, H>, ||G||², ||H||²
and max|H|, the second the update; of what the first reads for Oja's decay, H0 and w come once more
from L1 or L2 for H. For: any K and columns; a tile is several neurons where their weights are few.
Sums are in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ghl_kernels.merges import Layer, merge_of
from ghl_kernels.triton.launch import launch

BLOCK_NUMBERS = 2048
MOST_PROGRAMS = 1024  # of the second pass over one layer; each reads every neuron's maximum


@triton.jit
def decayed(H0, w, s, DECAY: tl.constexpr):
    """H = H0 - s w, the same in both passes to the last bit."""
    if DECAY == "none":
        return H0
    return tl.fma(-s, w, H0)


@triton.jit
def measure(
    G, H0, totals, w, scratch, neurons, k, K, columns,
    DECAY: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of the neurons k: scratch (2, K), s and max|H|; neurons (3, K), <G, H>, ||G||², ||H||²."""
    inside = k < K
    p = tl.arange(0, BLOCK_P)
    starts = k.to(tl.int64) * columns
    s = tl.zeros(k.shape, tl.float32)
    if DECAY == "oja":
        for first in range(0, columns, BLOCK_P):
            at = starts[:, None] + (first + p)[None, :]
            live = inside[:, None] & (first + p < columns)[None, :]
            hebbian = tl.load(H0 + at, live, other=0.0).to(tl.float32)
            s += tl.sum(hebbian * tl.load(w + at, live, other=0.0).to(tl.float32), 1)
    if DECAY == "instar":
        s = tl.load(totals + k, inside, other=0.0).to(tl.float32)
    GH, GG, HH = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s)
    largest = tl.zeros_like(s)
    for first in range(0, columns, BLOCK_P):
        at = starts[:, None] + (first + p)[None, :]
        live = inside[:, None] & (first + p < columns)[None, :]
        gradient = tl.load(G + at, live, other=0.0).to(tl.float32)
        hebbian = tl.load(H0 + at, live, other=0.0).to(tl.float32)
        weight = tl.load(w + at, live, other=0.0).to(tl.float32)
        H = tl.where(live, decayed(hebbian, weight, s[:, None], DECAY), 0.0)  # s may be infinite
        GH += tl.sum(gradient * H, 1)
        GG += tl.sum(gradient * gradient, 1)
        HH += tl.sum(H * H, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(H), 1))
    largest += tl.where(HH == HH, 0.0, HH)  # a maximum ignores NaN, the result must not
    tl.store(scratch + k, s, inside)
    tl.store(scratch + K + k, largest, inside)
    tl.store(neurons + k, GH, inside)
    tl.store(neurons + K + k, GG, inside)
    tl.store(neurons + 2 * K + k, HH, inside)


@triton.jit
def of_layer(numbers_of_neurons, K, MAXIMUM: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum, or the maximum, of one number of each neuron; NaN if one is."""
    total = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        numbers = tl.load(numbers_of_neurons + k, k < K, other=0.0)
        if MAXIMUM:
            total = tl.where((numbers > total) | (numbers != numbers), numbers, total)
        else:
            total += numbers
    if MAXIMUM:
        nan = tl.sum(tl.where(total == total, 0.0, total), 0)
        return tl.max(total, 0) + nan
    return tl.sum(total, 0)


@triton.jit
def combine(
    G, H0, totals, w, scratch, neurons, update, layer, program, programs, K, columns,
    DECAY: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program's part of the update; the first program also sums the layer's statistics."""
    LONG: tl.constexpr = 1024
    divisor = 1.0
    if NORMALIZE == "absmax":
        divisor = of_layer(scratch + K, K, True, LONG) + 1e-30
    if NORMALIZE == "mean":
        rows = tl.load(totals + K).to(tl.float32)
        divisor = tl.where(rows < 1.0, 1.0, rows)  # a maximum would ignore NaN
    if program == 0:
        for i in tl.static_range(3):
            tl.store(layer + i, of_layer(neurons + i * K, K, False, LONG))
    blocks_p = tl.cdiv(columns, BLOCK_P)
    for block in range(program, tl.cdiv(K, BLOCK_K) * blocks_p, programs):
        k = block // blocks_p * BLOCK_K + tl.arange(0, BLOCK_K)
        p = block % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
        live = (k < K)[:, None] & (p < columns)[None, :]
        at = k.to(tl.int64)[:, None] * columns + p[None, :]
        gradient = tl.load(G + at, live, other=0.0).to(tl.float32)
        sign = tl.where(gradient > 0.0, 1.0, tl.where(gradient < 0.0, -1.0, gradient))
        if GATE == "gradient":
            result = gradient
        elif GATE == "sign_only":
            result = sign
        else:
            hebbian = tl.load(H0 + at, live, other=0.0).to(tl.float32)
            weight = tl.load(w + at, live, other=0.0).to(tl.float32)
            s = tl.load(scratch + k, k < K, other=0.0)
            H = decayed(hebbian, weight, s[:, None], DECAY)
            if NORMALIZE != "none":
                H = tl.div_rn(H, tl.zeros_like(H) + divisor)
            result = -H if GATE == "hebb" else sign * tl.abs(H)
        tl.store(update + at, result.to(update.dtype.element_ty), live)


@triton.jit
def measure_kernel(
    G, H0, totals, w, scratch, neurons, K, columns,
    DECAY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    measure(G, H0, totals, w, scratch, neurons, k, K, columns, DECAY, BLOCK_P)


@triton.jit
def combine_kernel(
    G, H0, totals, w, scratch, neurons, update, layer, K, columns,
    DECAY: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    combine(
        G, H0, totals, w, scratch, neurons, update, layer,
        tl.program_id(0), tl.num_programs(0), K, columns,
        DECAY, GATE, NORMALIZE, BLOCK_K, BLOCK_P,
    )  # fmt: skip


def blocks(columns: int) -> tuple[int, int]:
    """Neurons and weights of each in a tile."""
    block_p = min(triton.next_power_of_2(columns), BLOCK_NUMBERS)
    return min(BLOCK_NUMBERS // block_p, 64), block_p


def fill(layer: Layer, decay: str, gate: str, normalize: str) -> None:
    """Fill the results of one layer, whose weight has numbers."""
    neurons, columns = layer.w.shape[0], layer.w[0].numel()
    block_k, block_p = blocks(columns)
    programs = triton.cdiv(neurons, block_k)
    launch(measure_kernel, (programs,), *layer[:6], neurons, columns, decay, block_k, block_p)
    programs = min(programs * triton.cdiv(columns, block_p), MOST_PROGRAMS)
    launch(
        combine_kernel, (programs,), *layer, neurons, columns,
        decay, gate, normalize, block_k, block_p,
    )  # fmt: skip


merge = merge_of(fill)
