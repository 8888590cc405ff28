"""G and H0 of a depthwise convolution: one input channel a group, so sums instead of products.

Cost: 4·M·K·R·S FLOPs on the ordinary units; reads x, y and g once per block of taps, row
statistics once, writes two K × R·S float32 sums per split. For: groups = in_channels, any channel
multiplier, kernel, stride, padding and dilation. Bound by memory, so all TAPS of a block share the
loads of y and g, and neighbouring taps find x in L1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ghl_kernels.pairs import Task
from ghl_kernels.splits import Partials
from ghl_kernels.triton.competition import u_of_tile
from ghl_kernels.triton.conv_wgrad import first_taps, image_arguments, is_on_image
from ghl_kernels.triton.launch import launch
from ghl_kernels.triton.logsumexp import Statistics, statistics
from ghl_kernels.tuning.tiles import programs


@triton.jit(do_not_specialize=["M"])  # a smaller last batch is no new kernel
def depthwise_wgrad_kernel(
    x, y, g, largest, inverse, winner, G, H0, u_sums,
    M, K, multiplier, columns, rows_per_split,
    in_height, in_width, positions, positions_multiplier, positions_shift,
    out_width, width_multiplier, width_shift,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    x_image, x_channel, x_height, x_width, y_row, y_column, g_row, g_column, scale,
    KERNEL_W: tl.constexpr, COMPETITION: tl.constexpr, SUM_U: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    blocks_of_taps = tl.cdiv(columns, TAPS)
    tile, split = tl.program_id(0), tl.program_id(1)
    k = tile // blocks_of_taps * BLOCK_K + tl.arange(0, BLOCK_K)
    tap = tile % blocks_of_taps * TAPS + tl.arange(0, TAPS)
    inside_k, inside_tap = k < K, tap < columns
    tap_h, tap_w = tap // KERNEL_W * dilation_h, tap % KERNEL_W * dilation_w
    tap_offset = tap_h * x_height + tap_w * x_width
    x += (k // multiplier * x_channel)[None, None, :]

    rows = tl.arange(0, BLOCK_M)
    y_tile = rows[:, None] * y_row + k[None, :] * y_column
    g_tile = rows[:, None] * g_row + k[None, :] * g_column
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    G_sum = tl.zeros((BLOCK_M, TAPS, BLOCK_K), tl.float32)
    H0_sum = tl.zeros((BLOCK_M, TAPS, BLOCK_K), tl.float32)
    u_sum = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for m in range(first, last, BLOCK_M):
        inside = m + rows < last
        image, h, w = first_taps(
            m + rows, positions, positions_multiplier, positions_shift, out_width,
            width_multiplier, width_shift, stride_h, stride_w, padding_h, padding_w,
        )  # fmt: skip
        x_rows = image.to(tl.int64) * x_image + (h * x_height + w * x_width)
        at_h, at_w = h[:, None] + tap_h[None, :], w[:, None] + tap_w[None, :]
        on_image = is_on_image(at_h, at_w, in_height, in_width)
        taken = (on_image & inside[:, None] & inside_tap[None, :])[:, :, None]
        x_at = (x_rows[:, None] + tap_offset[None, :])[:, :, None]
        x_here = tl.load(x + x_at, taken & inside_k[None, None, :], other=0.0).to(tl.float32)

        live = inside[:, None] & inside_k[None, :]
        g_here = tl.load(g + tl.cast(m, tl.int64) * g_row + g_tile, live, other=0.0).to(tl.float32)
        y_here = tl.load(y + tl.cast(m, tl.int64) * y_row + y_tile, live, other=0.0)
        u = u_of_tile(
            y_here, largest, inverse, winner, m + rows, inside, k, K, scale, COMPETITION, False
        ).to(tl.float32)
        u = tl.where(live, u, 0.0)
        G_sum += g_here[:, None, :] * x_here
        H0_sum += u[:, None, :] * x_here
        if SUM_U:
            u_sum += u

    G += split.to(tl.int64) * K * columns
    H0 += split.to(tl.int64) * K * columns
    weights = k[None, :] * columns + tap[:, None]
    kept = inside_k[None, :] & inside_tap[:, None]
    tl.store(G + weights, tl.sum(G_sum, 0), kept)
    tl.store(H0 + weights, tl.sum(H0_sum, 0), kept)
    if SUM_U:
        kept_u = inside_k & (tile % blocks_of_taps == 0)
        tl.store(u_sums + split * K + k, tl.sum(u_sum, 0), kept_u)


def depthwise_wgrad(task: Task, partials: Partials) -> None:
    """Fill `partials` from images x (N, channels, H, W), matrices y and g (M, K); tile.block_c
    taps."""
    problem, tile, x, y, g, competition, tau, _ = task
    row_statistics = Statistics(*partials.sums)  # any pointers, where nobody reads them
    if competition != "linear":
        row_statistics = statistics(y, competition, tau)
    launch(
        depthwise_wgrad_kernel, (programs(problem, tile), partials.splits),
        x, y, g, *row_statistics, *partials.sums,
        problem.rows, problem.all_neurons, problem.neurons, problem.taps, partials.rows_per_split,
        *image_arguments(task),
        problem.kernel_size[1], competition, partials.sum_u,
        tile.block_m, tile.block_k, tile.block_c,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
