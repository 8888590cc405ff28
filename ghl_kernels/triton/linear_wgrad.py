"""G = gᵀx and H0 = uᵀx of a linear layer in one pass: the dual weight gradient.

Cost: 4·M·K·C FLOPs; reads x (M, C), y and g (M, K) once per tile of the other dimension, writes
two K × C float32 sums per split. u exists only as a tile in registers and shared memory.
For: linear layers and dense 1×1 convolutions. K ≤ BLOCK_K: whole rows of y in a tile (IN_TILE);
more neurons: row statistics from `logsumexp.py`. By pointers, any strides; by tensor descriptors
(TMA), unit column strides and 16-byte row strides. `competition` linear with a stored u as y is
the stored form.

The product with g comes first, so that the exponentials of u run beside it, and u is the second
operand, which wgmma takes from shared memory: ptxas miscompiles some register-fed forms (triton
issue 9433).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ghl_kernels.pairs import Task
from ghl_kernels.problem import dot_precision
from ghl_kernels.splits import Partials
from ghl_kernels.triton.competition import exponent_scale, u_of_tile
from ghl_kernels.triton.launch import launch
from ghl_kernels.triton.loads import without_spills
from ghl_kernels.triton.logsumexp import Statistics, statistics
from ghl_kernels.tuning.tiles import programs


@triton.jit
def load_tile(
    source, first_row, row_stride, rows, inside_rows, columns, column_stride, inside_columns,
    first_column, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    if DESCRIPTORS:
        tile = source.load([first_row, first_column])
    else:
        source += tl.cast(first_row, tl.int64) * row_stride
        offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
        live = inside_rows[:, None] & inside_columns[None, :]
        tile = tl.load(source + offsets, live, other=0.0)
    return tile


@triton.jit(do_not_specialize=["M"])  # a smaller last batch is no new kernel
def linear_wgrad_kernel(
    x, y, g, largest, inverse, winner, G, H0, u_sums,
    M, K, C, rows_per_split,
    x_row, x_column, y_row, y_column, g_row, g_column, scale,
    COMPETITION: tl.constexpr, IN_TILE: tl.constexpr, SUM_U: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile, split = tl.program_id(0), tl.program_id(1)
    first_k, first_c = tile // tiles_c * BLOCK_K, tile % tiles_c * BLOCK_C
    k, c = first_k + tl.arange(0, BLOCK_K), first_c + tl.arange(0, BLOCK_C)
    inside_k, inside_c = k < K, c < C
    rows = tl.arange(0, BLOCK_M)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)

    G_sum = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    H0_sum = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    u_sum = tl.zeros((BLOCK_K,), tl.float32)
    tl.assume(last > first)
    for m in range(first, last, BLOCK_M):
        inside = m + rows < last
        xT = tl.trans(load_tile(
            x, m, x_row, rows, inside, c, x_column, inside_c, first_c, DESCRIPTORS
        ))  # fmt: skip
        g_tile = load_tile(g, m, g_row, rows, inside, k, g_column, inside_k, first_k, DESCRIPTORS)
        y_tile = load_tile(y, m, y_row, rows, inside, k, y_column, inside_k, first_k, DESCRIPTORS)
        G_sum = tl.dot(xT, g_tile, G_sum, input_precision=PRECISION)
        u = u_of_tile(
            y_tile, largest, inverse, winner, m + rows, inside, k, K, scale, COMPETITION, IN_TILE
        )
        H0_sum = tl.dot(xT, u, H0_sum, input_precision=PRECISION)
        if SUM_U:
            u_sum += tl.sum(tl.where(inside[:, None], u.to(tl.float32), 0.0), 0)

    G += split.to(tl.int64) * K * C
    H0 += split.to(tl.int64) * K * C
    at = k[None, :] * C + c[:, None]
    kept = inside_k[None, :] & inside_c[:, None]
    tl.store(G + at, G_sum, kept)
    tl.store(H0 + at, H0_sum, kept)
    if SUM_U:
        tl.store(u_sums + split * K + k, u_sum, inside_k & (tile % tiles_c == 0))


def takes_descriptors(*matrices: Tensor) -> bool:
    """Whether the copy engine can read these (rows, columns) as they lie."""
    return all(
        t.stride(1) == 1
        and t.data_ptr() % 16 == 0
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) >= t.shape[1]
        and t.numel() > 0
        for t in matrices
    )


def linear_wgrad(task: Task, partials: Partials) -> None:
    """Fill `partials` from x (M, C), y and g (M, K), matrices with offsets that `layout.fits`."""
    problem, tile, x, y, g, competition, tau, _ = task
    descriptors = tile.descriptors and takes_descriptors(x, y, g)
    sources = (x, y, g)
    if not descriptors:
        tile = without_spills(tile, problem, *sources)
    in_tile = problem.neurons <= tile.block_k
    row_statistics = Statistics(*partials.sums)  # any pointers, where nobody reads them
    if competition != "linear" and not in_tile:
        row_statistics = statistics(y, competition, tau)
    if descriptors:
        x_block, k_block = [tile.block_m, tile.block_c], [tile.block_m, tile.block_k]
        sources = tuple(
            TensorDescriptor.from_tensor(t, block)
            for t, block in ((x, x_block), (y, k_block), (g, k_block))
        )
    launch(
        linear_wgrad_kernel, (programs(problem, tile), partials.splits),
        *sources, *row_statistics, *partials.sums,
        problem.rows, problem.neurons, problem.channels, partials.rows_per_split,
        *x.stride(), *y.stride(), *g.stride(), exponent_scale(tau),
        competition, in_tile, partials.sum_u, dot_precision(problem), descriptors,
        tile.block_m, tile.block_k, tile.block_c,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
