"""What a Monitor must report, from plain autograd in float64 and explicit K×C products.

Uses hooks on outputs and `ghl_kernels.reference` only, nothing of `ghl.alignment`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghl_kernels import Rule, reference


def rows(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x as (groups, rows, C) and y as (groups, rows, K / groups)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, y.shape[-1])
    assert isinstance(layer, nn.Conv2d)
    x = reference.padded(x, layer.kernel_size, layer.padding, layer.dilation, layer.padding_mode)
    patches = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    n, _, positions = patches.shape
    groups = layer.groups
    patches = patches.view(n, groups, -1, positions).permute(1, 0, 3, 2)
    out = y.reshape(n, groups, -1, positions).permute(1, 0, 3, 2)
    return patches.reshape(groups, n * positions, -1), out.reshape(groups, n * positions, -1)


def cosine(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (a * b).sum(dims) / (a.square().sum(dims).sqrt() * b.square().sum(dims).sqrt())


def expected(
    layer: nn.Module, x: Tensor, y: Tensor, g: Tensor, rule: Rule | None = None
) -> dict[str, dict[str, Tensor]]:
    """Both statistics of one layer, from its x, y (with bias) and g = ∂ℓ/∂y of a mean loss."""
    rule = rule or Rule(competition="linear", decay="none")
    w = layer.weight.detach()
    h = y
    if layer.bias is not None:
        shape = (-1,) if isinstance(layer, nn.Linear) else (-1, 1, 1)
        h = y - layer.bias.detach().view(shape)
    linear = rule.competition == "linear"
    channel = -1 if isinstance(layer, nn.Linear) else 1
    u = h if linear else reference.compete(y.movedim(channel, 1), rule).movedim(1, channel)
    X, H = rows(layer, x, h)
    _, U = rows(layer, x, u)
    _, D = rows(layer, x, g)
    W = w.view(X.shape[0], -1, X.shape[2])
    direction = torch.einsum("grk,grc->rgkc", U, X)
    if rule.decay == "oja":
        direction = direction - torch.einsum("grk,grk,gkc->rgkc", U, H, W)
    elif rule.decay == "instar":
        direction = direction - torch.einsum("grk,gkc->rgkc", U, W)
    signal = -torch.einsum("grk,grc->rgkc", D, X)
    S, B = signal.sum(0), direction.mean(0)
    per_row = cosine(signal, direction, (1, 2, 3))
    per_neuron = cosine(signal, direction, (3,)).nanmean(0)
    return {
        "batch": {
            "cosine": cosine(S, B, (0, 1, 2)),
            "inner": (S * B).sum(),
            "neurons": cosine(S, B, (2,)).flatten(),
        },
        "sample": {
            "cosine": per_row.nanmean(),
            "inner": (signal * direction).sum(),
            "neurons": per_neuron.flatten(),
        },
    }


def record(model: nn.Module, run) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """x, y and g of every linear layer and convolution that ran once."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, layer in model.named_modules():
        if type(layer) in (nn.Linear, nn.Conv2d):

            def hook(layer, args, y, name=name):
                seen[name] = args[0].detach().clone(), y
                return y.clone()

            handles.append(layer.register_forward_hook(hook))
    gradients = torch.autograd.grad(run(model), [y for _, y in seen.values()])
    for handle in handles:
        handle.remove()
    return {
        name: (x, y.detach(), g) for (name, (x, y)), g in zip(seen.items(), gradients, strict=True)
    }


def assert_reported(reported: dict, expected: dict, tolerance: float = 1e-10) -> None:
    for part, numbers in expected.items():
        assert reported[part] is not None, reported["gaps"]
        for name, value in numbers.items():
            torch.testing.assert_close(
                torch.as_tensor(reported[part][name], dtype=value.dtype),
                value,
                rtol=tolerance,
                atol=tolerance,
                equal_nan=True,
                msg=lambda m, part=part, name=name: f"{part} {name}: {m}",
            )


def assert_same_report(found: dict, expected: dict, **tolerance: float) -> None:
    """Two reports agree in every number and in every gap."""
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert found[name]["gaps"] == layer["gaps"]
        numbers, wanted = (
            {key: value for key, value in each.items() if key != "gaps"}
            for each in (found[name], layer)
        )
        torch.testing.assert_close(numbers, wanted, equal_nan=True, **tolerance)
