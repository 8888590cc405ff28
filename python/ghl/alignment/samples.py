"""The sample statistic: alignment of single rows, from activations and without K×C numbers.

For one row the signal of neuron k is −g_k x and its Hebbian direction u_k d_k, where d_k is x less
its decay; so inner products and norms need only ‖x‖², h_k = w_k·x and ‖w_k‖².
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_norms(
    x: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """‖x‖² of every patch (N, groups, positions) of a batch of images (N, C, H, W)."""
    ones = x.new_ones((groups, x.shape[1] // groups, *kernel_size))
    return F.conv2d(x.square(), ones, None, stride, padding, dilation, groups).flatten(2)


def measure(
    x2: Tensor, w2: Tensor, h: Tensor, u: Tensor, g: Tensor, decay: str
) -> tuple[Tensor, Tensor]:
    """Sums over rows of ⟨S, B⟩, of its cosine, of cosines that exist: (K, 3) and the layer's (3).

    x2 (N, groups, 1, P): ‖x‖² of every row. w2 (groups, K/groups, 1): ‖w_k‖². h, u, g
    (N, groups, K/groups, P): output without bias, competition, ∂ℓ/∂h. A row whose signal or
    direction is zero has no cosine.
    """
    along, length2 = direction(x2, w2, h, decay)
    inner = -g * u * along
    signal2, hebbian2 = g.square() * x2, u.square() * length2
    neurons = [per_neuron(t) for t in (inner, *cosines(inner, signal2, hebbian2))]
    rows = [t.sum((1, 2)) for t in (inner, signal2, hebbian2)]
    layer = [t.sum() for t in (rows[0], *cosines(*rows))]
    return torch.stack(neurons, 1), torch.stack(layer)


def direction(x2: Tensor, w2: Tensor, h: Tensor, decay: str) -> tuple[Tensor, Tensor]:
    """⟨x, d⟩ and ‖d‖² for d = x (none), x − h w (oja), x − w (instar)."""
    if decay == "none":
        return x2, x2
    h2 = h.square()
    if decay == "oja":
        return x2 - h2, (x2 - 2 * h2 + h2 * w2).clamp_min(0)
    return x2 - h, (x2 - 2 * h + w2).clamp_min(0)


def cosines(inner: Tensor, signal2: Tensor, hebbian2: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines, 0 where one does not exist, and 1 where one does; NaN stays NaN."""
    product = signal2.sqrt() * hebbian2.sqrt()  # the product of squares would underflow
    exists = product != 0
    return torch.where(exists, inner / product, 0.0), exists.to(inner.dtype)


def per_neuron(t: Tensor) -> Tensor:
    """(N, groups, K/groups, P) summed over rows to (K)."""
    return t.sum((0, 3)).flatten()
