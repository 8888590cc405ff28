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
    pixels = x.square().unflatten(1, (groups, -1)).sum(2)
    ones = x.new_ones((1, 1, *kernel_size))
    sums = F.conv2d(pixels.flatten(0, 1)[:, None], ones, None, stride, padding, dilation)
    return sums.unflatten(0, (x.shape[0], groups)).flatten(2)


def measure(
    x2: Tensor, w2: Tensor, h: Tensor, u: Tensor, g: Tensor, decay: str
) -> tuple[Tensor, Tensor]:
    """Sums over rows of ⟨S, B⟩, of its cosine, of cosines that exist: (K, 3) and the layer's (3).

    x2 (N, groups, 1, P): ‖x‖² of every row. w2 (groups, K/groups, 1): ‖w_k‖². h, u, g
    (N, groups, K/groups, P): output without bias, competition, ∂ℓ/∂h. A row whose signal or
    direction is zero has no cosine.
    """
    along, length2 = direction(x2, w2, h, decay)
    product = g * u
    inner = (product * along).neg_()
    if decay == "none":  # S and B are multiples of one x
        cosine = inner.sign()
        exists = cosine * cosine
    else:
        lengths = x2.sqrt() * length2.sqrt()
        exists = ((product != 0) & (lengths != 0)).to(g.dtype)
        cosine = torch.where(exists != 0, -product.sign() * along / lengths, 0.0)
    neurons = torch.stack([per_neuron(t) for t in (inner, cosine, exists)], 1)
    rows = inner.sum((1, 2))
    signal2, hebbian2 = squares(g, x2), squares(u, length2)
    layer = torch.stack([rows.sum(), *(t.sum() for t in cosines(rows, signal2, hebbian2))])
    return neurons, layer


def squares(t: Tensor, factor: Tensor) -> Tensor:
    """Σ t² factor over groups and neurons, of every row (N, P)."""
    if factor.shape[2] == 1:
        return (t.square().sum(2) * factor.squeeze(2)).sum(1)
    return t.square().mul_(factor).sum((1, 2))


def direction(x2: Tensor, w2: Tensor, h: Tensor, decay: str) -> tuple[Tensor, Tensor]:
    """⟨x, d⟩ and ‖d‖² for d = x (none), x − h w (oja), x − w (instar)."""
    if decay == "none":
        return x2, x2
    h2 = h.square()
    if decay == "oja":
        return x2 - h2, (x2 - 2 * h2 + h2 * w2).clamp_min(0)
    return x2 - h, (x2 - 2 * h + w2).clamp_min(0)


def cosines(inner: Tensor, signal2: Tensor, hebbian2: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines, 0 where one does not exist or its squares vanish in the dtype, and 1 where one
    does; NaN where a square is not finite."""
    limits = torch.finfo(inner.dtype)
    vanishes = (signal2 < limits.tiny / limits.eps) | (hebbian2 < limits.tiny / limits.eps)
    product = signal2.sqrt() * hebbian2.sqrt()  # the product of squares would underflow
    found = (inner / product).where(product.isfinite(), float("nan"))
    return found.masked_fill(vanishes, 0.0), (~vanishes).to(inner.dtype)


def per_neuron(t: Tensor) -> Tensor:
    """(N, groups, K/groups, P) summed over rows to (K)."""
    return t.sum((0, 3)).flatten()
