"""The update as others write it, from x, y, g and w: what the kernels are measured against.

Each takes a layer's input x (N, C, H, W), output y, its gradient g and weight w, and gives
sign(G) ⊙ |H| normalised by max|H|: the published rule. `tests/test_authors.py` holds them to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ONE = (1, 1)


def numbers(pair: int | tuple[int, int]) -> list[int]:
    return [pair] * 2 if isinstance(pair, int) else list(pair)


def weight_gradient(
    x: Tensor, g: Tensor, w: Tensor, padding: int | tuple[int, int], stride: tuple[int, int] = ONE,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """gᵀx: a matrix product for a linear layer, the library's weight gradient for a convolution."""
    if x.shape[2:] == w.shape[2:] == (1, 1):
        return (g.flatten(1).T @ x.flatten(1)).view_as(w)
    return torch.ops.aten.convolution_backward(
        g, x, w, None, list(stride), numbers(padding), [1, 1], False, [0, 0], groups,
        [False, True, False],
    )[1]  # fmt: skip


def matmul_gradient(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
    """gᵀx of a dense 1×1 convolution as one matrix product over all positions."""
    rows = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (g, x))
    return (next(rows).T @ next(rows)).view_as(w)


def competition(y: Tensor, tau: float) -> Tensor:
    """u, in the memory order of y: torch.softmax over dimension 1 would copy a channels_last y."""
    if y.is_contiguous():
        return torch.softmax(y / tau, dim=1)
    rows = y.movedim(1, -1)
    return torch.softmax(rows if tau == 1 else rows / tau, dim=-1).movedim(-1, 1)


def gate(G: Tensor, H: Tensor) -> Tensor:
    return torch.abs(H / (torch.abs(H).amax() + 1e-30)) * torch.sign(G)


def oja(G: Tensor, H0: Tensor, w: Tensor) -> Tensor:
    """The update from both sums, (neurons, weights): s = <H0, w> needs no pass over activations."""
    return gate(G, H0 - (H0 * w).sum(1, keepdim=True) * w)


def by_rows(epilogue: Callable[..., Tensor], G: Tensor, H0: Tensor, w: Tensor) -> Tensor:
    """An epilogue of matrices, for weights (K, C, R, S) in the memory order of w."""
    if w.is_contiguous():
        return epilogue(*(t.reshape(len(w), -1) for t in (G, H0, w))).view_as(w)
    rows = [t.movedim(1, -1) for t in (G, H0, w)]
    return epilogue(*(t.reshape(len(w), -1) for t in rows)).view(rows[2].shape).movedim(-1, 1)


def authors_hebbian(
    x: Tensor, y: Tensor, w: Tensor, padding: int | tuple[int, int], tau: float,
    stride: tuple[int, int] = ONE,
) -> Tensor:  # fmt: skip
    """H as the published layer computes it: unfolded input, a product per image, their sum.

    arXiv 2601.21367 and its code: the competition over channels of the flattened output; the decay
    from a second elementwise product of the size of y.
    """
    batch, channels = y.shape[:2]
    flat = y.transpose(0, 1).reshape(channels, -1)
    u = torch.softmax(flat / tau, dim=0).view(channels, batch, *y.shape[2:]).transpose(0, 1)
    rows, columns = numbers(padding)
    padded = F.pad(x, [columns, columns, rows, rows])
    unfolded = F.unfold(padded, w.shape[2:], stride=stride).transpose(1, 2)
    per_image = torch.matmul(u.reshape(batch, channels, -1), unfolded)
    decay = torch.mul(u, y).sum(dim=(0, 2, 3)).view(-1, 1, 1, 1)
    return per_image.sum(dim=0).view_as(w) - decay * w


def authors(
    x: Tensor, y: Tensor, g: Tensor, w: Tensor, padding: int | tuple[int, int], tau: float,
    stride: tuple[int, int] = ONE,
) -> Tensor:  # fmt: skip
    """The published formulation, with backpropagation's gradient of the weight."""
    G = weight_gradient(x, g, w, padding, stride)
    return gate(G, authors_hebbian(x, y, w, padding, tau, stride))


def natural(
    x: Tensor, y: Tensor, g: Tensor, w: Tensor, padding: int | tuple[int, int], tau: float,
    stride: tuple[int, int] = ONE, groups: int = 1,
) -> Tensor:  # fmt: skip
    """What a good PyTorch user writes: u stored, two weight gradients, one elementwise product."""
    u = competition(y, tau)
    G, H0 = (weight_gradient(x, signal, w, padding, stride, groups) for signal in (g, u))
    return gate(G, H0 - (u * y).sum(dim=(0, 2, 3)).view(-1, 1, 1, 1) * w)


def trick(
    x: Tensor, y: Tensor, g: Tensor, w: Tensor, padding: int | tuple[int, int], tau: float,
    stride: tuple[int, int] = ONE, groups: int = 1, epilogue: Callable[..., Tensor] = oja,
) -> Tensor:  # fmt: skip
    """natural, with the decay from the sums. `epilogue`: oja, or its compiled form."""
    u = competition(y, tau)
    G, H0 = (weight_gradient(x, signal, w, padding, stride, groups) for signal in (g, u))
    return by_rows(epilogue, G, H0, w)


def trick_by_matmul(
    x: Tensor, y: Tensor, g: Tensor, w: Tensor, tau: float, epilogue: Callable[..., Tensor] = oja
) -> Tensor:
    """trick for a dense 1×1 convolution, where one matrix product may beat the library's wgrad."""
    u = competition(y, tau)
    return by_rows(epilogue, matmul_gradient(x, g, w), matmul_gradient(x, u, w), w)
