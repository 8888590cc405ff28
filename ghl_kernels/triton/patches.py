"""Patches of x laid along the rows, some rows of the batch at a time: (columns, rows).

Cost: writes every patch, and reads x as often, but for the first tap from L2. For: products in
TF32, whose tensor-core instructions on compute capability 9.0 and 10.0 take an operand from shared
memory only with its rows side by side. x may be of any strides; the columns are in the memory order
of a weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.problem import Problem
from ghl_kernels.triton.launch import launch
from ghl_kernels.tuning.tiles import ALIGNED

BLOCK_ROWS, LARGEST_BLOCK_CHANNELS = 128, 32


@triton.jit(do_not_specialize=["first", "rows"])  # a smaller last part is no new kernel
def patches_kernel(
    x, patches, first, rows, width, C, in_height, in_width, out_height, out_width,
    kernel_w, taps, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    x_image, x_channel, x_height, x_width,
    CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    columns = taps * tl.cdiv(C, BLOCK_CHANNELS)
    row = tl.program_id(0) // columns * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tap = tl.program_id(0) % columns % taps
    c = tl.program_id(0) % columns // taps * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    position = first + row
    h = position // out_width % out_height * stride_h - padding_h + tap // kernel_w * dilation_h
    w = position % out_width * stride_w - padding_w + tap % kernel_w * dilation_w
    image = (position // out_width // out_height).to(tl.int64)
    pixel = image * x_image + h.to(tl.int64) * x_height + w.to(tl.int64) * x_width
    on_image = (row < rows) & (h >= 0) & (h < in_height) & (w >= 0) & (w < in_width)
    offset = pixel[:, None] + (c.to(tl.int64) * x_channel)[None, :]
    found = tl.load(x + offset, on_image[:, None] & (c < C)[None, :], other=0.0)
    column = tap * C + c if CHANNELS_LAST else c * taps + tap
    there = column.to(tl.int64)[None, :] * width + row[:, None]
    # zeros up to the width, a multiple of 16: a mask of rows would forbid wide stores
    tl.store(patches + there, found, (row < width)[:, None] & (c < C)[None, :])


def lay_patches(
    patches: Tensor,
    x: Tensor,
    first: int,
    rows: int,
    problem: Problem,
    out_size: tuple[int, int],
    channels_last: bool,
) -> None:
    """Fill the first `rows` of patches (columns, width) with those of x (N, C, H, W) from output
    position `first` on; what follows in a block of rows is zeros."""
    channels = problem.channels
    block = min(LARGEST_BLOCK_CHANNELS, triton.next_power_of_2(channels))
    columns = problem.taps * triton.cdiv(channels, block)
    launch(
        patches_kernel, (triton.cdiv(rows, BLOCK_ROWS) * columns,),
        x, patches, first, rows, patches.stride(0), *x.shape[1:], *out_size,
        problem.kernel_size[1], problem.taps, *problem.stride, *problem.padding, *problem.dilation,
        *x.stride(), channels_last, BLOCK_ROWS, block,
    )  # fmt: skip


def empty_patches(rows: int, problem: Problem, like: Tensor) -> Tensor:
    """Room for the patches of so many rows, each column's at a multiple of ALIGNED numbers."""
    width = triton.cdiv(rows, ALIGNED) * ALIGNED
    return torch.empty(problem.columns, width, dtype=like.dtype, device=like.device)
