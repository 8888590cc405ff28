"""One layer's pair as all below the operators sees it: sizes and choices, not tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ghl_kernels import layout

# What is asked for of a layer's totals: the sums of u, which only `instar` needs, and the number
# of rows; only that, beside numbers that mean nothing; or an empty tensor.
TOTALS = "sums", "rows", "none"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A linear layer or a convolution, the batch it meets, and which sums are wanted.

    rows: batch, or batch × output positions. neurons, channels: of one group. sum_u, counted:
    whether sums of u and the number of rows are among the totals. channels_last: the memory order
    of the weight. overlapping: patches of x share memory although a kernel has one tap. image:
    numbers in one image of x. copied_bytes: what is read and written first because the activations
    are not in channels_last order. held: bytes of a copy of x that the sums are made from.
    """

    rows: int
    neurons: int
    channels: int
    dtype: torch.dtype
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    linear: bool = False  # not a convolution
    dilation: tuple[int, int] = (1, 1)
    competition: str = "softmax"
    sum_u: bool = False
    counted: bool = dataclasses.field(default=True, compare=False)
    channels_last: bool = False
    overlapping: bool = False
    image: int = dataclasses.field(default=0, compare=False)
    copied_bytes: int = dataclasses.field(default=0, compare=False)
    held: int = dataclasses.field(default=0, compare=False)

    @classmethod
    def of_linear(
        cls, x: Tensor, w: Tensor, competition: str = "softmax", totals: str = "rows"
    ) -> Problem:
        return cls(
            x.shape[0], w.shape[0], w.shape[1], x.dtype,
            linear=True, competition=competition,
            sum_u=totals == "sums", counted=totals != "none",
        )  # fmt: skip

    @classmethod
    def of_conv2d(
        cls,
        x: Tensor,
        y: Tensor,
        g: Tensor,
        w: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        competition: str = "softmax",
        totals: str = "rows",
    ) -> Problem:
        return cls(
            rows=y.shape[0] * y.shape[2] * y.shape[3],
            neurons=w.shape[0] // groups,
            channels=w.shape[1],
            dtype=x.dtype,
            kernel_size=(w.shape[2], w.shape[3]),
            stride=(stride[0], stride[1]),
            padding=(padding[0], padding[1]),
            groups=groups,
            dilation=(dilation[0], dilation[1]),
            competition=competition,
            sum_u=totals == "sums",
            counted=totals != "none",
            channels_last=layout.is_channels_last(w),
            image=x.shape[1] * x.shape[2] * x.shape[3],
            copied_bytes=layout.copied_bytes(x, y, g) if x.is_cuda else 0,
        )

    @property
    def taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def columns(self) -> int:
        """Weights of a neuron."""
        return self.taps * self.channels

    @property
    def all_neurons(self) -> int:
        return self.groups * self.neurons

    @property
    def pointwise(self) -> bool:
        """Whether a row of x is the channels of one position, and the rows of a batch follow each
        other."""
        dense = self.taps == 1 and self.groups == 1 and not self.overlapping
        return self.linear or (dense and self.stride == (1, 1) and self.padding == (0, 0))

    @property
    def depthwise(self) -> bool:
        return self.channels == 1 and self.groups > 1

    @property
    def foldable(self) -> bool:
        """Whether the taps of a row can be laid side by side, and stride_h rows of them."""
        taps = zip(self.kernel_size, self.dilation, strict=True)
        apart_h, apart_w = (size > 1 and dilation > 1 for size, dilation in taps)
        return self.groups == 1 and not apart_w and not (apart_h and self.stride[0] > 1)


def dot_precision(problem: Problem) -> str:
    """tf32 for float32 only where torch.backends allows it; 16-bit products do not ask."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if problem.linear else backends.cudnn.conv
    allowed = problem.dtype != torch.float32 or backend.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
