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
from ghl_kernels.composed import Triple
from ghl_kernels.layout import empty_rows, in_order_of, like_weight
from ghl_kernels.problem import Problem

FEWEST_GROUP_NEURONS = 8  # below it PyTorch's grouped kernels are faster: bench/FACTS.md
FEWEST_ROWS = 128  # below it PyTorch's products of matrices are

logsumexp = logsumexp_by("native")


def too_few(problem: Problem) -> str | None:
    """Why a layer's products are faster by PyTorch's operators, with no less precision; None if
    they are not."""
    if problem.groups > 1 and problem.neurons < FEWEST_GROUP_NEURONS:
        return f"groups of {problem.neurons} are too few neurons for a tile"
    if problem.linear and problem.rows < FEWEST_ROWS and problem.dtype.itemsize >= 4:
        return f"{problem.rows} rows are too few for a pass over the weight's sums"
    return None


def pair(problem: Problem, x: Tensor, y: Tensor, g: Tensor, w: Tensor, tau: float) -> Triple:
    """Sums of u come at no cost, asked for or not."""
    dtype = sum_dtype(x.dtype)
    G, H0 = empty_rows(w, dtype), empty_rows(w, dtype)
    totals = torch.empty(w.shape[0] + 1, dtype=dtype, device=w.device)
    images = (t[:, :, None, None] for t in (x, y, g)) if problem.linear else (x, y, g)
    weights = (t[:, :, None, None] for t in (G, H0)) if problem.linear else (G, H0)
    torch.ops.ghl_kernels.pair.native(
        *images, *weights, totals,
        problem.stride, problem.padding, problem.dilation, problem.groups,
        code("competition", problem.competition), tau, problem.channels_last,
    )  # fmt: skip
    wanted = totals if problem.counted else totals.new_empty(0)
    return like_weight(G, w, dtype), like_weight(H0, w, dtype), wanted


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
    """dtype: of the update, that of G where it is None. `overwrite`: it may take H0's memory."""
    accumulate = sum_dtype(G.dtype)
    H0 = in_order_of(w, H0, accumulate)
    update = H0 if overwrite else empty_rows(w, accumulate)
    neurons = torch.empty(3, w.shape[0], dtype=accumulate, device=w.device)
    layer = torch.empty(3, dtype=accumulate, device=w.device)
    torch.ops.ghl_kernels.merge.native(
        in_order_of(w, G, accumulate), H0, totals.to(accumulate).contiguous(),
        in_order_of(w, w, accumulate), update, neurons, layer,
        code("decay", decay), code("gate", gate), code("normalize", normalize),
    )  # fmt: skip
    return like_weight(update, w, dtype or G.dtype), neurons, layer


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


update = composed.update_of(pair, merge)
