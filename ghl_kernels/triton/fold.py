"""x copied into the buffer in which a convolution of few channels is one of many.

Cost: reads x once and writes every number of the buffer (N, rows, width, stride_h, depth) once, its
zeros included. For: x of any strides and dtype; what the buffer is, says `ghl_kernels/fold.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.fold import Shape
from ghl_kernels.triton.launch import launch

LARGEST_BLOCK = 2048


@triton.jit
def fold_kernel(
    x, buffer, rows, numbers, C, in_height, in_width, padding_h, padding_w,
    x_image, x_channel, x_height, x_width,
    STRIDE_H: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first_h = row % rows * STRIDE_H - padding_h
    x += (row // rows).to(tl.int64) * x_image
    buffer += row.to(tl.int64) * numbers
    for first in range(0, numbers, BLOCK):
        number = first + tl.arange(0, BLOCK)
        c = number % DEPTH
        h = first_h + number // DEPTH % STRIDE_H
        w = number // (DEPTH * STRIDE_H) - padding_w
        inside = number < numbers
        on_image = (h >= 0) & (h < in_height) & (w >= 0) & (w < in_width)
        offset = c.to(tl.int64) * x_channel + h.to(tl.int64) * x_height + w.to(tl.int64) * x_width
        found = tl.load(x + offset, inside & on_image & (c < C), other=0.0)
        tl.store(buffer + number, found, inside)


def fold_images(x: Tensor, shape: Shape, padding: tuple[int, int]) -> Tensor:
    """x (N, C, H, W) in a buffer of this shape; a program for each of its rows."""
    batch, rows, width, stride_h, depth = shape
    buffer = torch.empty(shape, dtype=x.dtype, device=x.device)
    numbers = width * stride_h * depth
    block = min(triton.next_power_of_2(numbers), LARGEST_BLOCK)
    launch(
        fold_kernel, (batch * rows,),
        x, buffer, rows, numbers, *x.shape[1:], *padding, *x.stride(), stride_h, depth, block,
    )  # fmt: skip
    return buffer
