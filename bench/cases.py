"""The layers that are measured: shapes, and what their update must cost at the least."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer at one batch size; a linear layer is a 1x1 image with a 1x1 kernel."""

    name: str
    batch: int
    in_channels: int
    size: int
    out_channels: int
    kernel_size: int = 1
    padding: int = 0
    tau: float = 1.0

    @property
    def rows(self) -> int:
        output = self.size + 2 * self.padding - self.kernel_size + 1
        return self.batch * output * output

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels, self.kernel_size, self.kernel_size

    @property
    def flops(self) -> int:
        """Two products of rows by out_channels by inputs per row."""
        return 4 * self.rows * self.out_channels * self.in_channels * self.kernel_size**2

    @property
    def bytes(self) -> int:
        """float32: x, y, g and w read once, the update written once."""
        weight = self.out_channels * self.in_channels * self.kernel_size**2
        x = self.batch * self.in_channels * self.size**2
        return 4 * (x + 2 * self.rows * self.out_channels + 2 * weight)

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, y, g, w as in the first step of training: Kaiming weights, unit-variance input."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, self.in_channels, self.size, self.size, generator=generator)
        fan_in = self.in_channels * self.kernel_size**2
        w = torch.randn(self.weight_shape, generator=generator) * (2 / fan_in) ** 0.5
        y = F.conv2d(x, w, padding=self.padding)
        g = torch.randn(y.shape, generator=generator) / self.rows
        return x, y, g, w


DEEPHEBB = (
    Case("deephebb.conv1", 64, 3, 32, 96, kernel_size=5, padding=2, tau=1.0),
    Case("deephebb.conv2", 64, 96, 16, 384, kernel_size=3, padding=1, tau=1 / 0.65),
    Case("deephebb.conv3", 64, 384, 8, 1536, kernel_size=3, padding=1, tau=4.0),
)
LINEAR = Case("linear.784.2000", 512, 784, 1, 2000)
CASES = {case.name: case for case in (*DEEPHEBB, LINEAR)}
