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
from ghl_kernels.compiled import code, logsumexp_by
from ghl_kernels.layout import empty_rows, in_order_of, is_channels_last, like_weight

Triple = tuple[Tensor, Tensor, Tensor]


logsumexp = logsumexp_by("native")


def linear_pair(
    x: Tensor, y: Tensor, g: Tensor, w: Tensor, competition: str, tau: float, sum_u: bool = True
) -> Triple:
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
    sum_u: bool = True,
) -> Triple:
    """`sum_u` is not asked: the kernels have the sums of u at no cost."""
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


linear_update, conv2d_update = composed.updates(linear_pair, conv2d_pair, merge)
