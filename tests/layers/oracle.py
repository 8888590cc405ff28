"""What a backward must leave in `weight.grad`, from a plain torch.nn model and the reference.

The plain model gives every layer's x, y and g = ∂L/∂y; `ghl_kernels.reference` does the rest in
float64. Nothing here uses the layers under test.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import ghl
from ghl_kernels import Rule, reference

Run = Callable[[nn.Module], Tensor]  # from a model to its loss

ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclasses.dataclass
class Call:
    """One use of one layer: its input, its output before anything in place, and ∂L/∂y."""

    layer: nn.Module
    x: Tensor
    y: Tensor
    g: Tensor

    def sums(self, rule: Rule, magnitude: bool = False) -> list[Tensor]:
        """G, H0, Σu and the number of rows in float64; of absolute values if `magnitude`."""
        x, y, g = (t.double() for t in (self.x, self.y, self.g))
        w = torch.zeros_like(self.layer.weight, dtype=torch.float64)
        if isinstance(self.layer, nn.Conv2d):
            x, y, g = (t if t.dim() == 4 else t[None] for t in (x, y, g))
            rows = y[:, 0].numel()
        else:
            x, y, g = (t.reshape(-1, t.shape[-1]) for t in (x, y, g))
            rows = y.shape[0]
        u = reference.compete(y, rule)
        if magnitude:
            x, g, u = x.abs(), g.abs(), u.abs()
        linear = Rule(competition="linear")  # takes u as given
        if isinstance(self.layer, nn.Conv2d):
            conv = self.layer
            G, H0, *_ = reference.conv2d_update(
                x, u, g, w, linear, conv.stride, conv.padding, conv.dilation, conv.groups,
                conv.padding_mode,
            )  # fmt: skip
        else:
            G, H0, *_ = reference.linear_update(x, u, g, w, linear)
        return [G, H0, u.movedim(1, 0).flatten(1).sum(1), torch.tensor(rows)]


def record(model: nn.Module, run: Run) -> dict[str, list[Call]]:
    """Every use of a Linear or Conv2d of a plain `model` in a loss, by the layer's name."""
    uses: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):

            def hook(layer: nn.Module, args: tuple, y: Tensor, name: str = name) -> Tensor:
                uses.append((name, layer, args[0].detach().clone(), y))
                return y.clone()  # so that operations in place leave y alone

            hooks.append(layer.register_forward_hook(hook))
    gradients = torch.autograd.grad(run(model), [y for *_, y in uses], allow_unused=True)
    for handle in hooks:
        handle.remove()
    calls: dict[str, list[Call]] = {}
    for (name, layer, x, y), g in zip(uses, gradients, strict=True):
        if g is not None:
            calls.setdefault(name, []).append(Call(layer, x, y.detach(), g))
    return calls


def assert_update(
    weight: Tensor,
    calls: Sequence[Call],
    rule: Rule,
    used: Tensor | None = None,
    rounding: float | None = None,
) -> None:
    """`weight.grad` is the reference's update for the sums of `calls`.

    Magnitudes must agree everywhere, signs where G stands out of its rounding error. used: the
    weight as the forward used it, where that is not `weight`.
    """
    assert weight.grad is not None
    rounding = ROUNDING[weight.dtype] if rounding is None else rounding
    update, w = weight.grad.double(), (weight if used is None else used).detach().double()

    def total(magnitude: bool) -> list[Tensor]:
        each = [call.sums(rule, magnitude) for call in calls]
        return [torch.stack(sums).sum(0) for sums in zip(*each, strict=True)]

    (G, H0, u_sum, rows), sizes = total(False), total(True)
    expected = reference.merge(G, H0, u_sum, int(rows), w, rule)
    error = update_error(expected, sizes, int(rows), w, rule, rounding)
    certain = (G.abs() > rounding * sizes[0]) | (sizes[0] == 0)  # 0 of a dead neuron is exact
    assert certain.double().mean() > 0.5 or not G.any(), "too few signs to compare"
    right = (update - expected.update).abs() <= error
    if rule.gate in ("sign", "sign_only"):
        right |= ~certain & ((update == 0) | ((update + expected.update).abs() <= error))
    assert right.all(), f"{(~right).sum()} of {right.numel()} numbers differ"


def update_error(
    expected: reference.Update,
    sizes: list[Tensor],
    rows: int,
    w: Tensor,
    rule: Rule,
    rounding: float,
) -> Tensor:
    """What rounding of sums of these sizes can change in an update."""
    if rule.gate == "gradient":
        return rounding * sizes[0]
    if rule.gate == "sign_only":
        return torch.zeros_like(w)
    decay = (
        (sizes[1] * w.abs()).flatten(1).sum(1).amax() if rule.decay == "oja" else sizes[2].amax()
    )
    H_size = sizes[1].amax() + decay * w.abs().amax()
    norm = {"absmax": expected.H.abs().amax() + 1e-30, "mean": max(rows, 1), "none": 1.0}
    return rounding * (H_size / norm[rule.normalize] + expected.update.abs())


def assert_like_reference(
    plain: nn.Module,
    run: Run,
    rule: Rule | str = "ghl",
    types: Sequence[type[nn.Module]] = (nn.Linear, nn.Conv2d),
    rounding: float | None = None,
) -> nn.Module:
    """Swap a copy of `plain`; its loss is the same, its weights get the update, the rest ∂L/∂p."""
    rule = Rule.of(rule)
    calls = record(plain, run)
    model = copy.deepcopy(plain)
    ghl.swap(model, rule, types=types)
    loss, plain_loss = run(model), run(plain)
    assert torch.equal(loss, plain_loss)
    loss.backward()
    plain_loss.backward()
    swapped = set()
    for name, layer in model.named_modules():
        if isinstance(layer, (ghl.Linear, ghl.Conv2d)) and layer.weight.requires_grad:
            assert_update(layer.weight, calls[name], rule, rounding=rounding)
            assert layer.weight.grad.stride() == layer.weight.stride()
            swapped.add(f"{name}.weight")
    assert swapped
    ordinary = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in swapped and parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, ordinary[name].grad)
    plain.zero_grad()
    return model
