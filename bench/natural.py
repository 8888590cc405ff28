"""A convolution that trains by the published rule as a good PyTorch user would write it.

The baseline of a whole training step: PyTorch's own operators, the competition stored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghl.bench.formulas import competition, gate


class NaturalFunction(torch.autograd.Function):
    """y = conv2d(x, w, b), whose weight gradient is sign(G) ⊙ |H| / max|H|."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Any, tau: float
    ) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, w, b = x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
        y = F.conv2d(x, w, b, *geometry)
        ctx.save_for_backward(x, w, b, y)
        ctx.geometry, ctx.tau = geometry, tau
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w, b, y = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        rest = stride, padding, dilation, False, [0, 0], groups
        backward = torch.ops.aten.convolution_backward
        bias = None if b is None else [w.shape[0]]
        mask = [ctx.needs_input_grad[0], True, b is not None]
        grad_x, G, grad_b = backward(g, x, w, bias, *rest, mask)
        u = competition(y, ctx.tau)
        H0 = backward(u, x, w, None, *rest, [False, True, False])[1]
        response = y if b is None else y - b.view(1, -1, 1, 1)
        decay = (u * response).sum(dim=(0, 2, 3)).view(-1, 1, 1, 1)
        return grad_x, gate(G, H0 - decay * w), grad_b, None, None


class NaturalConv2d(nn.Conv2d):
    """nn.Conv2d with zero padding, trained by the rule."""

    tau = 1.0

    def forward(self, input: Tensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        return NaturalFunction.apply(input, self.weight, self.bias, geometry, self.tau)


def swap(model: nn.Module, tau: float) -> None:
    """Make every convolution of `model` a NaturalConv2d, in place.

    A ReLU in place would overwrite the y that backward needs.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = NaturalConv2d
            module.tau = tau  # type: ignore[assignment]
        elif isinstance(module, nn.ReLU):
            module.inplace = False
