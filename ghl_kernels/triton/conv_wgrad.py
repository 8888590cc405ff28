"""G and H0 of a convolution in one pass, as an implicit GEMM: no matrix of patches exists.

Cost: 4·M·K·(C·R·S) FLOPs for M output positions; reads x once per tile of neurons (its overlapping
patches from L2), y and g once per tile of columns, writes two K × C·R·S float32 sums per split.
For: all of kernel size, stride, padding, dilation and groups, in three forms of the columns of a
tile. One tap and BLOCK_C channels: channels_last with 16 channels or more. TAPS = 3 taps of the
same row of the kernel: few neurons, as K = 64, where u is made once for three products. PACKED:
any columns of the weight, taps and channels mixed: three input channels, small groups, 1×1.
Few channels may come folded (`ghl_kernels/fold.py`): one tap of many channels then.

Rows become image positions by multiplication and shift, and row addresses are 64-bit; within an
image offsets are 32-bit. As in `linear_wgrad.py`, the product with g comes first and u is the
second operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ghl_kernels.pairs import Task
from ghl_kernels.problem import dot_precision
from ghl_kernels.splits import Partials
from ghl_kernels.triton.competition import exponent_scale, u_of_tile
from ghl_kernels.triton.launch import launch
from ghl_kernels.triton.loads import in_units, without_spills
from ghl_kernels.triton.logsumexp import Statistics, statistics
from ghl_kernels.tuning.tiles import programs


@triton.jit
def divide(n, multiplier, shift):
    """n // d for 0 <= n < 2**31, with the two numbers that `division_by(d)` gives."""
    n = n.to(tl.uint32)
    high = tl.umulhi(n, tl.full(n.shape, multiplier, tl.uint32))
    return ((high + n) >> tl.full(n.shape, shift, tl.uint32)).to(tl.int32)


def division_by(divisor: int) -> tuple[int, int]:
    """The multiplier and shift with which `divide` divides by 1 <= divisor < 2**31.

    The multiplier is below 2**32; as a signed number of the same bits it is one type of argument.
    """
    shift = (divisor - 1).bit_length()
    multiplier = ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1
    return multiplier - (multiplier >> 31 << 32), shift


@triton.jit
def first_taps(
    rows, positions, positions_multiplier, positions_shift, out_width, width_multiplier,
    width_shift, stride_h, stride_w, padding_h, padding_w,
):  # fmt: skip
    """The image of each row of y, and the height and width in it that the first tap reads."""
    image = divide(rows, positions_multiplier, positions_shift)
    position = rows - image * positions
    out_h = divide(position, width_multiplier, width_shift)
    h = out_h * stride_h - padding_h
    w = (position - out_h * out_width) * stride_w - padding_w
    return image, h, w


@triton.jit
def is_on_image(h, w, in_height, in_width):
    """What is not there is padding."""
    return (h >= 0) & (h < in_height) & (w >= 0) & (w < in_width)


@triton.jit
def columns_of_tile(
    tile, C, columns, ALL_TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PACKED: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The number of tiles side by side; of this one the first tap or, packed, every column's, the
    channels, whether there are such columns, and, packed, their numbers."""
    if PACKED:
        tiles_c = tl.cdiv(columns, BLOCK_C)
        column = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        if CHANNELS_LAST:
            tap, c = column // C, column % C
        else:
            tap, c = column % ALL_TAPS, column // ALL_TAPS
        inside_c = column < columns
    else:
        blocks_c = tl.cdiv(C, BLOCK_C)
        tiles_c = blocks_c * (ALL_TAPS // TAPS)
        tap = tile % tiles_c // blocks_c * TAPS
        c = tile % tiles_c % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
        inside_c = c < C
        column = c
    return tiles_c, tap, c, inside_c, column


@triton.jit
def load_patches(
    x, x_rows, h, w, tap_h, tap_w, c, inside, inside_c, in_height, in_width, dilation_w,
    x_channel, x_height, x_width, PACKED: tl.constexpr, TAPS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """x of the rows, transposed, for each tap of the tile."""
    xT = ()
    for t in tl.static_range(TAPS):
        w_of_tap = tap_w + t * dilation_w
        offset = (tap_h * x_height + w_of_tap * x_width) * UNIT + c * x_channel
        if PACKED:
            at_h, at_w = h[:, None] + tap_h[None, :], w[:, None] + w_of_tap[None, :]
        else:
            at_h, at_w = (h + tap_h)[:, None], (w + w_of_tap)[:, None]
        live = is_on_image(at_h, at_w, in_height, in_width) & inside[:, None] & inside_c[None, :]
        x_tile = tl.load(x + x_rows[:, None] + offset[None, :], live, other=0.0)
        xT = xT + (tl.trans(x_tile),)
    return xT


@triton.jit
def conv_wgrad_kernel(
    x, y, g, largest, inverse, winner, G, H0, u_sums,
    M, K, C, columns, rows_per_split,
    in_height, in_width, positions, positions_multiplier, positions_shift,
    out_width, width_multiplier, width_shift,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    x_image, x_channel, x_height, x_width, y_row, y_column, g_row, g_column, scale,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    COMPETITION: tl.constexpr, IN_TILE: tl.constexpr, SUM_U: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, TAPS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ALL_TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    tiles_c, tap, c, inside_c, column = columns_of_tile(
        tile, C, columns, ALL_TAPS, CHANNELS_LAST, PACKED, TAPS, BLOCK_C
    )
    tap_h, tap_w = tap // KERNEL_W * dilation_h, tap % KERNEL_W * dilation_w
    k = tile // tiles_c * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_k = k < K
    first_neuron = group * K
    x += tl.cast(group, tl.int64) * C * x_channel
    y += tl.cast(first_neuron, tl.int64) * y_column
    g += tl.cast(first_neuron, tl.int64) * g_column

    rows = tl.arange(0, BLOCK_M)
    y_tile = rows[:, None] * y_row + k[None, :] * y_column
    g_tile = rows[:, None] * g_row + k[None, :] * g_column
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    zeros = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    G_sums = (zeros,) * TAPS
    H0_sums = (zeros,) * TAPS
    u_sum = tl.zeros((BLOCK_K,), tl.float32)
    tl.assume(last > first)
    for m in range(first, last, BLOCK_M):
        inside = m + rows < last
        image, h, w = first_taps(
            m + rows, positions, positions_multiplier, positions_shift, out_width,
            width_multiplier, width_shift, stride_h, stride_w, padding_h, padding_w,
        )  # fmt: skip
        x_rows = (image.to(tl.int64) * x_image + (h * x_height + w * x_width)) * UNIT
        xT = load_patches(
            x, x_rows, h, w, tap_h, tap_w, c, inside, inside_c, in_height, in_width, dilation_w,
            x_channel, x_height, x_width, PACKED, TAPS, UNIT,
        )  # fmt: skip
        live = inside[:, None] & inside_k[None, :]
        g_here = tl.load(g + tl.cast(m, tl.int64) * g_row + g_tile, live, other=0.0)
        y_here = tl.load(y + tl.cast(m, tl.int64) * y_row + y_tile, live, other=0.0)
        sums = ()
        for t in tl.static_range(TAPS):
            sums = sums + (tl.dot(xT[t], g_here, G_sums[t], input_precision=PRECISION),)
        G_sums = sums
        u = u_of_tile(
            y_here, largest, inverse, winner, m + rows, inside, k + first_neuron,
            first_neuron + K, scale, COMPETITION, IN_TILE,
        )  # fmt: skip
        sums = ()
        for t in tl.static_range(TAPS):
            sums = sums + (tl.dot(xT[t], u, H0_sums[t], input_precision=PRECISION),)
        H0_sums = sums
        if SUM_U:
            u_sum += tl.sum(tl.where(inside[:, None], u.to(tl.float32), 0.0), 0)

    neurons = tl.num_programs(2) * K
    G += split.to(tl.int64) * neurons * columns
    H0 += split.to(tl.int64) * neurons * columns
    kept = inside_k[None, :] & inside_c[:, None]
    for t in tl.static_range(TAPS):
        if PACKED:
            at = column
        elif CHANNELS_LAST:
            at = (tap + t) * C + c
        else:
            at = c * ALL_TAPS + tap + t
        weights = (first_neuron + k)[None, :] * columns + at[:, None]
        tl.store(G + weights, G_sums[t], kept)
        tl.store(H0 + weights, H0_sums[t], kept)
    if SUM_U:
        kept_u = inside_k & (tile % tiles_c == 0)
        tl.store(u_sums + split * neurons + first_neuron + k, u_sum, kept_u)


def image_arguments(task: Task, unit: int = 1) -> tuple:
    """What a kernel over images is told of them, from `in_height` to `scale`."""
    problem, (height, width) = task.problem, task.out_size
    x_image, x_channel, x_height, x_width = task.x.stride()
    return (
        *task.x.shape[2:], height * width, *division_by(height * width), width, *division_by(width),
        *problem.stride, *problem.padding, *problem.dilation,
        x_image // unit, x_channel, x_height // unit, x_width // unit,
        *task.y.stride(), *task.g.stride(), exponent_scale(task.tau),
    )  # fmt: skip


def conv_wgrad(task: Task, partials: Partials) -> None:
    """Fill `partials` from images x (N, C·groups, H, W) and matrices y and g (M, K·groups)."""
    problem, tile, x, y, g, competition, tau, _ = task
    unit = 1 if tile.packed else in_units(x)
    tile = without_spills(tile, problem, y, g, *([] if tile.packed or unit > 1 else [x]))
    in_tile = problem.groups == 1 and problem.neurons <= tile.block_k
    row_statistics = Statistics(*partials.sums)  # any pointers, where nobody reads them
    if competition != "linear" and not in_tile:
        row_statistics = statistics(y, competition, tau)
    in_group = programs(problem, tile) // problem.groups
    launch(
        conv_wgrad_kernel, (in_group, partials.splits, problem.groups),
        x, y, g, *row_statistics, *partials.sums,
        problem.rows, problem.neurons, problem.channels, problem.columns, partials.rows_per_split,
        *image_arguments(task, unit),
        *problem.kernel_size, partials.channels_last, competition, in_tile, partials.sum_u,
        dot_precision(problem), tile.packed, tile.taps, unit,
        tile.block_m, tile.block_k, tile.block_c,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
