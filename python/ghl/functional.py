"""Linear and convolution whose backward gives the raw sums beside the ordinary gradients.

The forward is PyTorch's own. The output y is needed again in backward: it is kept as an alias, so
it costs memory only when nothing else (a batch norm, say) keeps it, and it is computed again when
an in-place operation has overwritten it by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghl.sums import RawSums, as_rows


def cast_for_autocast(x: Tensor, *rest: Tensor | None) -> list[Tensor | None]:
    """Each tensor in the dtype autocast would use for it here; as it is without autocast."""
    tensors = [x, *rest]
    if not torch.is_autocast_enabled(x.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def save(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> None:
    """Keep what backward needs. `ctx.overwritten()` tells whether y was changed in place since.

    A traced graph has no in-place operations left, and there a copy that nothing needs is removed.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(x, w, b, y.clone())
        ctx.probe = None
        return
    ctx.save_for_backward(x, w, b, y.data)  # .data: no version check, or backward would refuse
    ctx.probe = y.detach()  # shares y's version counter...
    ctx.probe.data = y.new_empty(0)  # ...but not its memory
    ctx.version = y._version


def saved_output(ctx: Any, y: Tensor, recompute: Callable[[], Tensor]) -> Tensor:
    """The y that forward returned."""
    if ctx.probe is not None and ctx.probe._version != ctx.version:
        return recompute()
    return y


class LinearFunction(torch.autograd.Function):
    """y = x wᵀ + b; the leaves come first, so that their sums arrive before the weight's."""

    @staticmethod
    def forward(
        ctx: Any,
        hebbian: Tensor,
        totals: Tensor,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        competition: str,
        tau: float,
    ) -> Tensor:
        x_used, w_used, b_used = cast_for_autocast(x, w, b)
        y = F.linear(x_used, w_used, b_used)
        save(ctx, x_used, w, b, y)
        ctx.rule = competition, tau
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w, b, y = ctx.saved_tensors
        used = w.to(x.dtype)
        _, _, needs_x, _, needs_b, *_ = ctx.needs_input_grad
        grad_x = g @ used if needs_x else None
        rows = g.reshape(-1, g.shape[-1])
        grad_b = rows.sum(0) if needs_b else None
        with torch.no_grad():
            bias = None if b is None else b.to(x.dtype)
            y = saved_output(ctx, y, lambda: F.linear(x, used, bias))
            G, H0, totals = torch.ops.ghl_kernels.linear_pair(
                x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), rows, w, *ctx.rule
            )
        return as_rows(H0, w), totals, grad_x, G, grad_b, None, None


class Conv2dFunction(torch.autograd.Function):
    """y = conv2d(x, w, b) of a zero-padded batch; geometry as aten::convolution takes it."""

    @staticmethod
    def forward(
        ctx: Any,
        hebbian: Tensor,
        totals: Tensor,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        competition: str,
        tau: float,
    ) -> Tensor:
        x_used, w_used, b_used = cast_for_autocast(x, w, b)
        y = F.conv2d(x_used, w_used, b_used, stride, padding, dilation, groups)
        save(ctx, x_used, w, b, y)
        ctx.geometry = stride, padding, dilation, groups
        ctx.rule = competition, tau
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w, b, y = ctx.saved_tensors
        used = w.to(x.dtype)
        stride, padding, dilation, groups = ctx.geometry
        _, _, needs_x, _, needs_b, *_ = ctx.needs_input_grad
        grad_x, _, grad_b = torch.ops.aten.convolution_backward(
            g, x, used, [w.shape[0]], stride, padding, dilation, False, [0, 0], groups,
            [needs_x, False, needs_b],
        )  # fmt: skip
        with torch.no_grad():
            bias = None if b is None else b.to(x.dtype)
            y = saved_output(ctx, y, lambda: F.conv2d(x, used, bias, *ctx.geometry))
            G, H0, totals = torch.ops.ghl_kernels.conv2d_pair(
                x, y, g, w, stride, padding, dilation, groups, *ctx.rule
            )
        return as_rows(H0, w), totals, grad_x, G, grad_b, None, None, None, None, None, None


def note_dtype(x: Tensor, w: Tensor, sums: RawSums) -> None:
    """Tell the merge in which dtype this forward uses the weight."""
    dtype = w.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    if sums.compute_dtype != dtype:
        sums.compute_dtype = dtype


def linear(x: Tensor, w: Tensor, b: Tensor | None, sums: RawSums) -> Tensor:
    """F.linear of x (..., in_features) whose backward feeds `sums`."""
    note_dtype(x, w, sums)
    rule = sums.rule
    return LinearFunction.apply(sums.hebbian, sums.totals, x, w, b, rule.competition, rule.tau)


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    sums: RawSums,
) -> Tensor:
    """F.conv2d of x (N, C, H, W) whose backward feeds `sums`."""
    note_dtype(x, w, sums)
    rule = sums.rule
    return Conv2dFunction.apply(
        sums.hebbian, sums.totals, x, w, b, stride, padding, dilation, groups,
        rule.competition, rule.tau,
    )  # fmt: skip
