"""The operators by the C++ kernels of `csrc`, through their `.native` overloads.

Allocates outputs in a layout the kernels write and hands them over; arguments are already checked.
Which library was loaded, or why none, is in `ghl_kernels.library`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghl_kernels import composed
from ghl_kernels.checks import sum_dtype
from ghl_kernels.rule import CHOICES

Triple = tuple[Tensor, Tensor, Tensor]


def code(argument: str, value: str) -> int:
    """The position of a choice in its vocabulary: how csrc/rule.h numbers it."""
    return CHOICES[argument].index(value)


def is_channels_last(w: Tensor) -> bool:
    """Whether a neuron's weights lie in the order (kh, kw, in_channels)."""
    return (
        w.dim() == 4
        and not w.is_contiguous()
        and w.is_contiguous(memory_format=torch.channels_last)
    )


def empty_rows(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty, of the shape of w: channels_last if w is, else contiguous."""
    layout = torch.channels_last if is_channels_last(w) else torch.contiguous_format
    return torch.empty(w.shape, dtype=dtype, device=w.device, memory_format=layout)


def in_order_of(w: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype` and the memory order of the sums of w; a copy only if it is not."""
    layout = torch.channels_last if is_channels_last(w) else torch.contiguous_format
    return t.to(dtype).contiguous(memory_format=layout)


def like_weight(result: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """`result` with the strides of torch.empty_like(w): a copy only for a w in neither layout."""
    like = torch.empty_like(w, dtype=dtype)
    if like.stride() == result.stride() and dtype == result.dtype:
        return result
    return like.copy_(result)


def logsumexp(y: Tensor, tau: float, dim: int) -> Tensor:
    dim %= y.dim()
    rows = [*y.shape[:dim], *y.shape[dim + 1 :]]
    lse = torch.empty(rows, dtype=sum_dtype(y.dtype), device=y.device)
    outer, inner = y.shape[:dim].numel(), y.shape[dim + 1 :].numel()
    torch.ops.ghl_kernels.logsumexp.native(y.reshape(outer, y.shape[dim], inner, 1), lse, tau)
    return lse


def linear_pair(x: Tensor, y: Tensor, g: Tensor, w: Tensor, competition: str, tau: float) -> Triple:
    x, y, g = (t[:, :, None, None] for t in (x, y, g))
    pair = conv2d_pair(x, y, g, w[:, :, None, None], [1, 1], [0, 0], [1, 1], 1, competition, tau)
    return (
        like_weight(pair[0].flatten(1), w, pair[0].dtype),
        like_weight(pair[1].flatten(1), w, pair[1].dtype),
        pair[2],
    )


def conv2d_pair(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    competition: str,
    tau: float,
) -> Triple:
    dtype = sum_dtype(x.dtype)
    G, H0 = empty_rows(w, dtype), empty_rows(w, dtype)
    totals = torch.empty(w.shape[0] + 1, dtype=dtype, device=w.device)
    torch.ops.ghl_kernels.pair.native(
        x, y, g, G, H0, totals, stride, padding, dilation, groups,
        code("competition", competition), tau, is_channels_last(w),
    )  # fmt: skip
    return like_weight(G, w, dtype), like_weight(H0, w, dtype), totals


def merge(
    G: Tensor,
    H0: Tensor,
    totals: Tensor,
    w: Tensor,
    decay: str,
    gate: str,
    normalize: str,
    overwrite: bool = False,
) -> Triple:
    """`overwrite`: the update may take the memory of H0."""
    dtype = sum_dtype(G.dtype)
    H0 = in_order_of(w, H0, dtype)
    update = H0 if overwrite else empty_rows(w, dtype)
    neurons = torch.empty(3, w.shape[0], dtype=dtype, device=w.device)
    layer = torch.empty(3, dtype=dtype, device=w.device)
    torch.ops.ghl_kernels.merge.native(
        in_order_of(w, G, dtype), H0, totals.to(dtype).contiguous(), in_order_of(w, w, dtype),
        update, neurons, layer,
        code("decay", decay), code("gate", gate), code("normalize", normalize),
    )  # fmt: skip
    return like_weight(update, w, G.dtype), neurons, layer


def foreach_merge(
    G: Sequence[Tensor],
    H0: Sequence[Tensor],
    totals: Sequence[Tensor],
    w: Sequence[Tensor],
    decay: str,
    gate: str,
    normalize: str,
) -> composed.Triples:
    return composed.layer_by_layer(merge, (G, H0, totals, w), decay, gate, normalize)
