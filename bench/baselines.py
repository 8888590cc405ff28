"""What the kernels are measured against: the update as others write it, from x, y, g and w.

Each takes a layer's input x (N, C, H, W), output y, its gradient g and weight w, and gives
sign(G) ⊙ |H| normalised by max|H|: the published rule. `tests/test_authors.py` holds them to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def weight_gradient(x: Tensor, g: Tensor, w: Tensor, padding: int) -> Tensor:
    """gᵀx: a matrix product for a linear layer, the library's weight gradient for a convolution."""
    if x.shape[2:] == w.shape[2:] == (1, 1):
        return (g.flatten(1).T @ x.flatten(1)).view_as(w)
    return torch.ops.aten.convolution_backward(
        g, x, w, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]


def gate(G: Tensor, H: Tensor) -> Tensor:
    return torch.abs(H / (torch.abs(H).amax() + 1e-30)) * torch.sign(G)


def authors_hebbian(x: Tensor, y: Tensor, w: Tensor, padding: int, tau: float) -> Tensor:
    """H as the published layer computes it: unfolded input, a product per image, their sum.

    arXiv 2601.21367 and its code: the competition over channels of the flattened output; the decay
    from a second elementwise product of the size of y.
    """
    batch, channels = y.shape[:2]
    flat = y.transpose(0, 1).reshape(channels, -1)
    u = torch.softmax(flat / tau, dim=0).view(channels, batch, *y.shape[2:]).transpose(0, 1)
    unfolded = F.unfold(F.pad(x, [padding] * 4), w.shape[2:]).transpose(1, 2)
    per_image = torch.matmul(u.reshape(batch, channels, -1), unfolded)
    decay = torch.mul(u, y).sum(dim=(0, 2, 3)).view(-1, 1, 1, 1)
    return per_image.sum(dim=0).view_as(w) - decay * w


def authors(x: Tensor, y: Tensor, g: Tensor, w: Tensor, padding: int, tau: float) -> Tensor:
    """The published formulation, with backpropagation's gradient of the weight."""
    return gate(weight_gradient(x, g, w, padding), authors_hebbian(x, y, w, padding, tau))


def natural(x: Tensor, y: Tensor, g: Tensor, w: Tensor, padding: int, tau: float) -> Tensor:
    """What a good PyTorch user writes: u stored, two weight gradients, one elementwise product."""
    u = torch.softmax(y / tau, dim=1)
    G, H0 = weight_gradient(x, g, w, padding), weight_gradient(x, u, w, padding)
    return gate(G, H0 - (u * y).sum(dim=(0, 2, 3)).view(-1, 1, 1, 1) * w)


def trick(x: Tensor, y: Tensor, g: Tensor, w: Tensor, padding: int, tau: float) -> Tensor:
    """natural, with the decay from the sums: s = <H0, w> needs no pass over activations."""
    u = torch.softmax(y / tau, dim=1)
    G, H0 = weight_gradient(x, g, w, padding), weight_gradient(x, u, w, padding)
    return gate(G, H0 - (H0 * w).sum(dim=(1, 2, 3)).view(-1, 1, 1, 1) * w)


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
