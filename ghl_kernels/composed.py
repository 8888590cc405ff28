"""The operators composed of PyTorch's own, for every device and with nothing compiled.

The fallback, and the baseline that kernels must beat: u is stored, at the size of y, and each
weight gradient is one library call. Arguments are already checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ghl_kernels.checks import sum_dtype
from ghl_kernels.layout import is_channels_last, like_weight
from ghl_kernels.problem import Problem

SMALL_TAU = 2.0**-100  # y by a smaller one may be infinite, of which softmax makes NaN

Triple = tuple[Tensor, Tensor, Tensor]
Triples = tuple[list[Tensor], list[Tensor], list[Tensor]]


def logsumexp(y: Tensor, tau: float, dim: int) -> Tensor:
    return torch.logsumexp(y.to(sum_dtype(y.dtype)) / tau, dim)


def logsumexp_backward(grad: Tensor, y: Tensor, lse: Tensor, tau: float, dim: int) -> Tensor:
    share = torch.exp(y.to(lse.dtype) / tau - lse.unsqueeze(dim))
    return (grad.unsqueeze(dim) * share / tau).to(y.dtype)


def compete(y: Tensor, competition: str, tau: float) -> Tensor:
    """u in the dtype of y; the neurons compete along dimension 1."""
    if competition == "linear":
        return y
    if competition == "softmax":
        return softmax(y, tau)
    winner = torch.zeros_like(y).scatter_(1, y.argmax(1, keepdim=True), 1)
    if competition == "hard":
        return winner.masked_fill_(y.isnan().any(1, keepdim=True), float("nan"))
    return compete(y, "softmax", tau) * (2 * winner - 1)


def softmax(y: Tensor, tau: float) -> Tensor:
    """In the memory order of y: torch.softmax over dimension 1 would copy a channels_last y."""
    rows, dim = (y.movedim(1, -1), -1) if is_channels_last(y) else (y, 1)
    dtype = sum_dtype(y.dtype)
    if tau < SMALL_TAU:
        rows, tau = rows - rows.amax(dim, keepdim=True), max(tau, torch.finfo(dtype).tiny)
    scaled = rows if tau == 1 else rows.to(dtype) / tau
    return torch.softmax(scaled, dim, dtype=dtype).to(y.dtype).movedim(dim, 1)


def totals(u: Tensor, rows: int, sum_u: bool, counted: bool = True) -> Tensor:
    """The sum of u for each neuron, if it is asked for, and last the number of rows; empty if that
    is not asked for either."""
    dtype = sum_dtype(u.dtype)
    if not sum_u:
        return u.new_full((u.shape[1] + 1 if counted else 0,), rows, dtype=dtype)
    neurons = u.to(dtype).movedim(1, 0).flatten(1).sum(1)
    return torch.cat([neurons, neurons.new_full((1,), rows)])


def no_rows(problem: Problem, w: Tensor, dtype: torch.dtype = torch.float32) -> Triple:
    """The pair of an empty batch."""
    G = torch.zeros_like(w, dtype=dtype)
    return G, G.clone(), w.new_zeros(w.shape[0] + 1 if problem.counted else 0, dtype=dtype)


def weight_gradient(problem: Problem, signal: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """signalᵀx, in the dtype of x; of w only the shape and the memory order are read."""
    if problem.linear:
        return signal.T @ x
    return torch.ops.aten.convolution_backward(
        signal, x, torch.empty_like(w, dtype=x.dtype), None,
        problem.stride, problem.padding, problem.dilation, False, [0, 0], problem.groups,
        [False, True, False],
    )[1]  # fmt: skip


def float16_scale(u: Tensor, x: Tensor) -> Tensor:
    """For each neuron of u (N, K, ...) the power of two, 1 at most, with which its sums of u x are
    no more than 2¹⁵, half of what float16 holds."""
    rows = [dim for dim in range(u.dim()) if dim != 1]
    largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    sums = torch.linalg.vector_norm(u, 1, rows, dtype=torch.float32) * largest
    return torch.ldexp(torch.ones_like(sums), (15 - sums.frexp().exponent).clamp(-24, 0))


def hebbian(product: Callable[[Tensor], Tensor], u: Tensor, x: Tensor) -> Tensor:
    """H0 = uᵀx, by what gives the product of x with a signal in their dtype.

    Sums over many rows are beyond float16, and it is G alone for which a GradScaler looks: there
    they are those of a smaller u, and float32. Every neuron has its own scale: what is little
    beside the strongest's would be nothing by that one's.
    """
    if u.dtype != torch.float16 or u.numel() == 0 or x.numel() == 0:
        return product(u)
    scale = float16_scale(u, x)
    smaller = u * scale.to(u.dtype).view(-1, *[1] * (u.dim() - 2))
    sums = product(smaller).float()
    return sums / scale.view(-1, *[1] * (sums.dim() - 1))


def products_of(compete: Callable[[Tensor, str, float], Tensor]) -> Callable[..., Triple]:
    """G and H0 by the library, in the dtype of x where that can be, and totals; from a u that
    `compete` stores."""

    def products(
        problem: Problem, x: Tensor, y: Tensor, g: Tensor, w: Tensor, tau: float
    ) -> Triple:
        if problem.rows == 0:
            return no_rows(problem, w, sum_dtype(x.dtype))
        u = compete(y, problem.competition, tau)
        G = weight_gradient(problem, g, x, w)
        H0 = hebbian(lambda signal: weight_gradient(problem, signal, x, w), u, x)
        return G, H0, totals(u, problem.rows, problem.sum_u, problem.counted)

    return products


def pair_of(products: Callable[..., Triple]) -> Callable[..., Triple]:
    """The pair of an implementation whose products are not in the dtype of sums."""

    def pair(problem: Problem, x: Tensor, y: Tensor, g: Tensor, w: Tensor, tau: float) -> Triple:
        *pair, totals = products(problem, x, y, g, w, tau)
        G, H0 = (like_weight(product, w, sum_dtype(x.dtype)) for product in pair)
        return G, H0, totals

    return pair


products = products_of(compete)
pair = pair_of(products)


def merge(
    G: Tensor,
    H0: Tensor,
    totals: Tensor,
    w: Tensor,
    decay: str,
    gate: str,
    normalize: str,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Triple:
    """dtype: of the update, that of G where it is None. `overwrite`: H may take H0's memory."""
    accumulate = sum_dtype(G.dtype)
    G_sum, H, w, totals = (t.to(accumulate) for t in (G, H0, w, totals))
    if decay != "none":
        s = (H * w).flatten(1).sum(1) if decay == "oja" else totals[:-1]
        decayed = s.view(-1, *[1] * (w.dim() - 1)) * w
        H = H.sub_(decayed) if overwrite else H - decayed

    products = (G_sum, H), (G_sum, G_sum), (H, H)
    neurons = torch.stack([(a * b).flatten(1).sum(1) for a, b in products])
    update = gated(G_sum, H, totals[-1], gate, normalize)
    update = torch.empty_like(w, dtype=dtype or G.dtype).copy_(update)
    return update, neurons, neurons.sum(1)


def sign(G: Tensor) -> Tensor:
    """sign(G) that keeps NaN."""
    return torch.where(G.isnan(), G, G.sign())


def gated(G: Tensor, H: Tensor, rows: Tensor, gate: str, normalize: str) -> Tensor:
    """What the optimizer is given; NaN in G or H stays NaN, which torch.sign alone would hide."""
    if gate == "gradient":
        return G
    if gate == "sign_only":
        return sign(G)
    if normalize == "absmax" and H.numel() > 0:
        H = H / (H.abs().amax() + 1e-30)
    elif normalize == "mean":
        H = H / rows.clamp(min=1)
    return -H if gate == "hebb" else sign(G) * H.abs()


def layer_by_layer(
    merge: Callable[..., Triple], sums: Sequence[Sequence[Tensor]], *choices: str
) -> Triples:
    """`merge` of every layer; `sums` are the lists of G, H0, totals and w."""
    layers = [merge(*one, *choices) for one in zip(*sums, strict=True)]
    update, neurons, layer = ([merged[i] for merged in layers] for i in range(3))
    return update, neurons, layer


def foreach_merge(
    G: Sequence[Tensor],
    H0: Sequence[Tensor],
    totals: Sequence[Tensor],
    w: Sequence[Tensor],
    decay: str,
    gate: str,
    normalize: str,
) -> Triples:
    return layer_by_layer(merge, (G, H0, totals, w), decay, gate, normalize)


def update_of(pair: Callable[..., Triple], merge: Callable[..., Triple]) -> Callable[..., Triple]:
    """The update of an implementation: its pair (or products), with its merge as epilogue."""

    def update(
        problem: Problem, x: Tensor, y: Tensor, g: Tensor, w: Tensor, tau: float, *choices: str
    ) -> Triple:
        # w as the forward used it, the update in the dtype of w
        sums = pair(problem, x, y, g, w, tau)
        return merge(*sums, w.to(x.dtype), *choices, dtype=w.dtype, overwrite=True)

    return update


update = update_of(products, merge)
