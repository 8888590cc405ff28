"""What the kernels are measured against: `ghl.bench.formulas`, and the authors' layer.

The formulas are installed with the package, so that `ghl bench` has them too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ghl.bench.formulas import authors, authors_hebbian, gate, natural, trick, weight_gradient

__all__ = ["AuthorsConv2d", "authors", "authors_hebbian", "gate", "natural", "trick"]
__all__ += ["weight_gradient"]


class AuthorsConv2d(nn.Conv2d):
    """A layer that trains as the published one: H in the forward, combined after backward."""

    tau = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            with torch.no_grad():
                H = authors_hebbian(x, y, self.weight, self.padding[0], self.tau)
                self.hebbian = H / (H.abs().amax() + 1e-30)
        return y

    def update_gradient(self) -> None:
        """To be called between backward and the optimizer's step."""
        with torch.no_grad():
            self.weight.grad.copy_(self.hebbian.abs() * self.weight.grad.sign())
