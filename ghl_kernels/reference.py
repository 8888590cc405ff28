"""The rule in plain PyTorch, in the symbols of the paper (arXiv 2601.21367, section 3).

The oracle of every test: any float dtype, any layout, no cleverness; fast paths live elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ghl_kernels.rule import Rule


class Update(NamedTuple):
    """What one layer learns from one batch, each of the weight's shape.

    G: the ordinary gradient gᵀx. H0: the Hebbian correlation uᵀx. H: H0 less its decay, before
    normalisation. update: what the optimizer is given as `weight.grad`.
    """

    G: Tensor
    H0: Tensor
    H: Tensor
    update: Tensor


def compete(y: Tensor, rule: Rule) -> Tensor:
    """u of the same shape as y; the neurons compete along dimension 1. NaN in a row fills it."""
    if rule.competition == "linear":
        return y
    winner = F.one_hot(y.argmax(1), y.shape[1]).movedim(-1, 1).bool()
    if rule.competition == "hard":
        return winner.to(y.dtype).masked_fill(y.isnan().any(1, keepdim=True), float("nan"))
    u = torch.softmax(y / rule.tau, dim=1)
    return u if rule.competition == "softmax" else torch.where(winner, u, -u)


def decayed(H0: Tensor, u_sum: Tensor, w: Tensor, rule: Rule) -> Tensor:
    """H = H0 - s ⊙ w. Oja's s_k = Σ u_k (w_k·x) is <H0_k, w_k>, because w·x is linear in x."""
    if rule.decay == "none":
        return H0
    s = (H0 * w).flatten(1).sum(1) if rule.decay == "oja" else u_sum
    return H0 - s.view(-1, *[1] * (w.dim() - 1)) * w


def normalized(H: Tensor, rows: int, rule: Rule) -> Tensor:
    """H by its largest magnitude, by the number of rows it is a sum over, or as it is."""
    if rule.normalize == "absmax" and H.numel() > 0:
        return H / (H.abs().amax() + 1e-30)
    return H / max(rows, 1) if rule.normalize == "mean" else H


def sign(G: Tensor) -> Tensor:
    """-1, 0 or 1; NaN where G is NaN (torch.sign gives 0 there and would hide it)."""
    return torch.where(G.isnan(), G, G.sign())


def merge(G: Tensor, H0: Tensor, u_sum: Tensor, rows: int, w: Tensor, rule: Rule) -> Update:
    """The update from sums that are linear in the data: sum those first, then merge once."""
    H = decayed(H0, u_sum, w, rule)
    if rule.gate == "gradient":
        update = G
    elif rule.gate == "sign_only":
        update = sign(G)
    elif rule.gate == "hebb":
        update = -normalized(H, rows, rule)
    else:
        update = sign(G) * normalized(H, rows, rule).abs()
    return Update(G, H0, H, update)


def linear_update(x: Tensor, y: Tensor, g: Tensor, w: Tensor, rule: Rule | str = "ghl") -> Update:
    """x (..., C), y and g (..., K), w (K, C), one dtype: output y and its gradient g = ∂L/∂y."""
    rule = Rule.of(rule)
    x, y, g = (t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (x, y, g))
    u = compete(y, rule)
    return merge(g.T @ x, u.T @ x, u.sum(0), x.shape[0], w, rule)


def padded(
    x: Tensor,
    kernel_size: tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: tuple[int, int],
    padding_mode: str,
) -> Tensor:
    """x (N, C, H, W) padded as nn.Conv2d does: `same` puts the odd row or column at the end."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        assert not isinstance(padding, str), f"padding is {padding!r}"
        sides = [(p, p) for p in height_width(padding)]
    (top, bottom), (left, right) = sides
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return F.pad(x, (left, right, top, bottom), mode=mode)


def height_width(value: int | tuple[int, int]) -> tuple[int, int]:
    """An int for both dimensions, or a pair as it is."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def conv2d_update(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    w: Tensor,
    rule: Rule | str = "ghl",
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Update:
    """x (N, C, H, W), y and g (N, K, Ho, Wo), w (K, C/groups, kh, kw), one dtype.

    A row is an output position, its presynaptic input the patch under the kernel. All K channels
    of a position compete; each group's channels correlate with that group's inputs.
    """
    rule, stride, dilation = Rule.of(rule), height_width(stride), height_width(dilation)
    kernel_size = (w.shape[2], w.shape[3])
    x = padded(x, kernel_size, padding, dilation, padding_mode)
    u = compete(y, rule)

    rows, cols = (d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True))
    patches = x.unfold(2, rows, stride[0]).unfold(3, cols, stride[1])
    patches = patches[..., :: dilation[0], :: dilation[1]]

    def correlate(signal: Tensor) -> Tensor:
        by_group = zip(signal.chunk(groups, 1), patches.chunk(groups, 1), strict=True)
        return torch.cat([torch.einsum("nkhw,nchwij->kcij", s, p) for s, p in by_group])

    positions = y.shape[0] * y.shape[2] * y.shape[3]
    return merge(correlate(g), correlate(u), u.sum((0, 2, 3)), positions, w, rule)
