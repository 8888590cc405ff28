"""The optimizers of `ghl train`, and what each keeps of a parameter from step to step.

Which parameters have which learning rate and decay is `ghl.param_groups`' business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OPTIMIZERS = ("sgd", "adamw")


def build(
    name: str, groups: Sequence[dict[str, Any]], lr: float, momentum: float, fused: bool
) -> Optimizer:
    """The optimizer of that name; `momentum` is SGD's."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused or None)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused or None)
    if fused and momentum:
        # A first step that a GradScaler leaves out would leave uninitialised memory for momentum.
        optimizer.state.update((p, initial(optimizer, p)) for g in groups for p in g["params"])
    return optimizer


def state(optimizer: Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """By name of the parameter what is kept of it, zeros before the first step."""
    return {
        name: initial(optimizer, p) | optimizer.state.get(p, {})
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def initial(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(optimizer, torch.optim.AdamW):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        device = parameter.device if optimizer.defaults["fused"] else "cpu"
        return {"step": torch.zeros((), device=device), **moments}
    if optimizer.defaults["momentum"]:
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {}


def restore(
    optimizer: Optimizer, model: nn.Module, held: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Take over what `state` gave."""
    for name, p in model.named_parameters():
        if name in held:
            optimizer.state[p] = dict(held[name])
