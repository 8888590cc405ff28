"""A convolution of few channels as one of many: the taps of a kernel's row become channels.

x is copied once into a buffer (N, rows, width, stride_h, depth) of zeros where x has nothing: row p
of a padded image goes to [p // stride_h, :, p % stride_h], and `depth` is the channels and what
fills a position up to 16 bytes. A pixel there is stride_h rows of one column, and so many pixels as
the kernel is wide lie side by side: the layer is a convolution of `taps` pixels as channels, with
a kernel of one column, stride 1 and no padding, over a view whose positions overlap. Its rows are
in the order they had, so y and g are read as they are; kernels read x 16 bytes at a time.

Cost: reads x and writes the buffer, about stride_h·stride_w·depth numbers an output position, held
until the sums are made: 108 MB for the first layer of a ResNet-50 at 256 images and 16 bits, whose
y is 411 MB. Sums of columns that no weight has (256 instead of 147 there), and a copy of the
K·C·R·S others into the order of the weight. Nothing here launches a kernel of ours.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ghl_kernels import layout
from ghl_kernels.problem import Problem

CHANNELS = 16  # a multiple of so many is what Triton compiles wide loads for

Shape = tuple[int, int, int, int, int]


def multiple_with(factor: int, of: int, least: int) -> int:
    """The smallest number from `least` on whose product with `factor` is a multiple of `of`."""
    step = of // math.gcd(of, factor)
    return -(-least // step) * step


@dataclasses.dataclass(frozen=True)
class Fold:
    """How a layer is folded.

    problem: the layer, one of those that can be (`Problem.foldable`). depth: numbers that a
    position of x becomes. taps: pixels in a row of the kernel, its own and what fills it up.
    """

    problem: Problem
    depth: int
    taps: int

    @classmethod
    def of(cls, problem: Problem) -> Fold:
        (stride_h, stride_w), chunk = problem.stride, 16 // problem.dtype.itemsize
        depth = multiple_with(stride_h * stride_w, chunk, problem.channels)
        taps = multiple_with(stride_h * depth, CHANNELS, problem.kernel_size[1])
        return cls(problem, depth, taps)

    @property
    def pixel(self) -> int:
        """Numbers of a pixel of the buffer."""
        return self.problem.stride[0] * self.depth

    @property
    def step(self) -> int:
        """Numbers from an output position to the next."""
        return self.problem.stride[1] * self.pixel

    @property
    def kernel_height(self) -> int:
        return -(-self.problem.kernel_size[0] // self.problem.stride[0])

    @property
    def dilation(self) -> tuple[int, int]:
        return (self.problem.dilation[0] if self.problem.stride[0] == 1 else 1, 1)

    def folded(self, held: int = 0) -> Problem:
        """The convolution of many channels; `held`: bytes of the buffer.

        Its padding is in the buffer, whose patches overlap even if its kernel has one tap.
        """
        return dataclasses.replace(
            self.problem, channels=self.taps * self.pixel, kernel_size=(self.kernel_height, 1),
            stride=(1, 1), padding=(0, 0), dilation=self.dilation, channels_last=True,
            overlapping=True, held=held,
        )  # fmt: skip

    def shape(self, batch: int, out_size: tuple[int, int]) -> Shape:
        """The buffer's: what the output positions read, and a width that keeps rows at multiples
        of a step."""
        (height, width), (stride_h, stride_w) = out_size, self.problem.stride
        rows = height + (self.kernel_height - 1) * self.dilation[0]
        columns = (width - 1) * stride_w + self.taps
        return batch, rows, -(-columns // stride_w) * stride_w, stride_h, self.depth

    def fits(self, shape: Shape) -> bool:
        """Whether offsets in an image of the buffer, its rows and the sums have 31 bits."""
        batch, rows, width, _, _ = shape
        in_image = (rows + 1) * width * self.pixel + self.taps * self.pixel
        sums = self.problem.neurons * self.kernel_height * self.taps * self.pixel
        return max(in_image, batch * rows, sums) <= layout.LARGEST_SIZE

    def images(self, buffer: Tensor, out_size: tuple[int, int]) -> Tensor:
        """The buffer as the images (N, taps · pixel, rows, out width) that overlap in it."""
        batch, rows, width, _, _ = buffer.shape
        size = batch, self.taps * self.pixel, rows, out_size[1]
        row = width * self.pixel
        return buffer.as_strided(size, (rows * row, 1, row, self.step))

    def weight(self, w: Tensor) -> Tensor:
        """Empty, of the shape and the memory order of the sums; nobody reads or writes it."""
        shape = w.shape[0], self.taps * self.pixel, self.kernel_height, 1
        return torch.empty(shape, dtype=w.dtype, device=w.device, memory_format=torch.channels_last)

    def unfolded(self, sums: Tensor, w: Tensor) -> Tensor:
        """Sums like `weight` in the shape and strides of w (K, C, R, S), float32."""
        _, channels, height, width = w.shape
        by_tap = sums.movedim(1, 3).reshape(
            w.shape[0], self.kernel_height, self.taps, self.problem.stride[0], self.depth
        )
        kernel = by_tap[:, :, :width, :, :channels].permute(0, 4, 1, 3, 2).flatten(2, 3)
        return layout.like_weight(kernel[:, :, :height], w, torch.float32)


def fold_images(x: Tensor, shape: Shape, padding: tuple[int, int]) -> Tensor:
    """x (N, C, H, W) in a buffer of this shape, by PyTorch's operators: zeros everywhere, and one
    copy for each of stride_h rows."""
    _, rows, width, stride_h, _ = shape
    (padding_h, padding_w), (channels, in_height, in_width) = padding, x.shape[1:]
    buffer = x.new_zeros(shape)
    columns = max(0, min(in_width, width - padding_w))
    for row in range(stride_h):
        first = max(0, -(-(padding_h - row) // stride_h))
        h = first * stride_h + row - padding_h
        count = min(rows - first, -(-(in_height - h) // stride_h))
        if count > 0 and columns > 0:
            lines = x[:, :, h : h + count * stride_h : stride_h, :columns].permute(0, 2, 3, 1)
            there = slice(first, first + count), slice(padding_w, padding_w + columns)
            buffer[(slice(None), *there, row, slice(channels))] = lines
    return buffer
