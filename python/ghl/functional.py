"""Linear and convolution whose backward gives the raw sums beside the ordinary gradients.

The forward is PyTorch's own. The output y is needed again in backward: it is kept as an alias, so
it costs memory only when nothing else (a batch norm, say) keeps it, and it is computed again when
an in-place operation has overwritten it by then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghl.sums import RawSums, check_pair
from ghl_kernels.checks import sum_dtype
from ghl_kernels.layout import as_rows, is_channels_last
from ghl_kernels.rule import totals_for


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast has operations on x's device compute in; None without autocast."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def used_as(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in the dtype autocast would use for it."""
    return t if dtype is None or t.dtype == torch.float64 else t.to(dtype)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For what a backward computes of a forward in the dtype of x, wherever it is called."""
    kind = x.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def save(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> None:
    """Keep what backward needs, and what tells `saved_output` whether y was overwritten since.

    Of w, whose uses may be many, no copy in autocast's dtype. A traced graph has no in-place
    operations left, and there a copy that nothing needs is removed.
    """
    # asked for here: dynamo has a backward that asks how a tensor lies copy every gradient first
    ctx.channels_last = is_channels_last(w)
    if torch.compiler.is_compiling():
        ctx.save_for_backward(x, w, b, y.clone())
        ctx.probe = None
        return
    # .data: no version check, or backward would refuse
    ctx.save_for_backward(x, w, b, y.data)
    ctx.set_materialize_grads(False)  # what gives y no gradient gives the weight none
    ctx.around = torch._C._current_graph_task_id()  # a backward that recomputes, or -1
    ctx.probe = y.detach()  # shares y's version counter...
    ctx.probe.data = y.new_empty(0)  # ...but not its memory
    ctx.version = y._version


def is_differentiated() -> bool:
    """Whether the running backward will itself be differentiated: create_graph=True."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def saved_output(
    ctx: Any,
    y: Tensor,
    operation: Callable[..., Tensor],
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """The y that forward returned; the operation again where it was overwritten since, or where
    compiled autograd traces an eager forward's backward and versions tell nothing."""
    if ctx.probe is None:
        return y
    if not torch.compiler.is_compiling() and ctx.probe._version == ctx.version:
        return y
    with torch.no_grad(), without_autocast(x):
        return operation(x, w, None if b is None else b.to(x.dtype), *geometry)


def for_pair(w: Tensor, used: Tensor) -> Tensor:
    """The weight in a dtype that a pair takes, which asks no more of it than how it lies: a
    bfloat16 one may have been used in float16, by autocast."""
    return w if w.dtype in (used.dtype, sum_dtype(used.dtype)) else used


def wanted(ctx: Any, totals: Tensor) -> Tensor | None:
    """As the gradient of a leaf, if there is one."""
    return totals if ctx.needs_input_grad[1] else None


class LinearFunction(torch.autograd.Function):
    """y = x wᵀ + b of rows x (M, C); hebbian and totals are leaves whose gradients are the sums of
    the rule, totals None where nobody is to have them."""

    @staticmethod
    def forward(
        ctx: Any,
        hebbian: Tensor,
        totals: Tensor | None,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        competition: str,
        tau: float,
        totals_of: str,
    ) -> Tensor:
        dtype = autocast_dtype(x)
        y = F.linear(x, used_as(w, dtype), None if b is None else used_as(b, dtype))
        save(ctx, x, w, b, y)
        ctx.rule = competition, tau, totals_of
        ctx.hebbian = None if torch.compiler.is_compiling() else hebbian
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return (None,) * 8
        x, w, b, y = ctx.saved_tensors
        _, _, needs_x, _, needs_b, *_ = ctx.needs_input_grad
        used = w.to(x.dtype)
        grad_x = g @ used if needs_x else None
        grad_b = g.sum(0) if needs_b else None
        note_pair(ctx, w, x.dtype)
        y = saved_output(ctx, y, F.linear, x, used, b)
        G, H0, totals = torch.ops.ghl_kernels.linear_pair_no_grad(
            x, y, g, for_pair(w, used), *ctx.rule
        )
        if is_differentiated():
            with without_autocast(x):
                G = g.mT @ x
        return as_rows(H0, ctx.channels_last), wanted(ctx, totals), grad_x, G, grad_b, *[None] * 3


class Conv2dFunction(torch.autograd.Function):
    """y = conv2d(x, w, b) of a zero-padded batch; geometry as aten::convolution takes it."""

    @staticmethod
    def forward(
        ctx: Any,
        hebbian: Tensor,
        totals: Tensor | None,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        competition: str,
        tau: float,
        totals_of: str,
    ) -> Tensor:
        dtype = autocast_dtype(x)
        b_used = None if b is None else used_as(b, dtype)
        y = F.conv2d(x, used_as(w, dtype), b_used, stride, padding, dilation, groups)
        save(ctx, x, w, b, y)
        ctx.geometry = stride, padding, dilation, groups
        ctx.rule = competition, tau, totals_of
        ctx.hebbian = None if torch.compiler.is_compiling() else hebbian
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return (None,) * 12
        x, w, b, y = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        _, _, needs_x, _, needs_b, *_ = ctx.needs_input_grad
        used = w.to(x.dtype)
        # not of the bias, with which oneDNN makes G as well, asked for or not
        grad_x, differentiable_G, _ = torch.ops.aten.convolution_backward(
            g, x, used, None, stride, padding, dilation, False, [0, 0], groups,
            [needs_x, is_differentiated(), False],
        )  # fmt: skip
        grad_b = g.sum((0, 2, 3)) if needs_b else None
        note_pair(ctx, w, x.dtype)
        y = saved_output(ctx, y, F.conv2d, x, used, b, *ctx.geometry)
        G, H0, totals = torch.ops.ghl_kernels.conv2d_pair_no_grad(
            x, y, g, for_pair(w, used), stride, padding, dilation, groups, *ctx.rule
        )
        if is_differentiated():
            G = differentiable_G
        return as_rows(H0, ctx.channels_last), wanted(ctx, totals), grad_x, G, grad_b, *[None] * 7


def prepared(x: Tensor, w: Tensor, sums: RawSums) -> Tensor:
    """x as the forward uses it; its cast is no part of the Function, or graphs of gradients would
    end there. The merge is told in which dtype and order of memory this forward uses the weight.

    Whatever it was told before: asked in a traced forward, that would be a guard which fails in a
    second step under autocast, and all of a model was compiled twice.
    """
    dtype = autocast_dtype(x)
    sums.channels_last = is_channels_last(w)
    sums.compute_dtype = w.dtype if w.dtype == torch.float64 else dtype or w.dtype
    return used_as(x, dtype)


def behind_leaves(w: Tensor) -> Tensor:
    """w as a view: its gradient then takes a step more than those of the leaves of its sums.

    Autograd accumulates into leaves before it does anything else, but into those of one operation
    in no set order; so all sums have arrived when the hooks of w run, and they see the update.
    """
    return w.view_as(w)


def note_pair(ctx: Any, w: Tensor, dtype: torch.dtype) -> None:
    """Tell the sums that this backward made a pair, and in which dtype its forward used the weight:
    with inputs=, autograd may drop its H0; other forwards may have come since."""
    if ctx.hebbian is not None:
        check_pair(ctx.hebbian, w)
        ctx.hebbian._ghl_dtype = dtype
        ctx.hebbian._ghl_around = ctx.around
        ctx.hebbian._ghl_paired = torch._C._current_graph_task_id()


def signals(sums: RawSums) -> tuple[str, float, str]:
    """What the pair must know of a rule; the sums of u are no by-product of a GPU's kernels, and
    the number of rows is a launch of its own."""
    totals = "none" if sums.totals is None else totals_for(sums.rule.decay)
    return sums.rule.competition, float(sums.tau), totals


def linear(x: Tensor, w: Tensor, b: Tensor | None, sums: RawSums) -> Tensor:
    """F.linear of x (..., in_features) whose backward feeds `sums`."""
    x = prepared(x, w, sums)
    flat = x.dim() in (0, 2)  # 0 is an error of F.linear
    rows = x if flat else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = LinearFunction.apply(sums.hebbian, sums.totals, rows, behind_leaves(w), b, *signals(sums))
    # made a view here: autograd lets nobody change in place what a Function returns as one
    return y if flat else y.view(*x.shape[:-1], y.shape[-1])


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    sums: RawSums,
) -> Tensor:
    """F.conv2d of x (N, C, H, W) whose backward feeds `sums`."""
    x = prepared(x, w, sums)
    return Conv2dFunction.apply(
        sums.hebbian, sums.totals, x, behind_leaves(w), b, stride, padding, dilation, groups,
        *signals(sums),
    )  # fmt: skip
