"""Optimizer groups: the weights that a rule trains apart from everything else."""

from __future__ import annotations

from typing import Any

from torch import nn

from ghl.layers import Plastic, check_module


def param_groups(
    model: nn.Module,
    lr: float,
    lr_hebb: float | None = None,
    wd: float = 0.0,
    wd_hebb: float | None = None,
) -> list[dict[str, Any]]:
    """Two groups for a torch.optim optimizer: weights of ghl layers, then all other parameters.

    lr_hebb and wd_hebb are the first group's learning rate and weight decay, lr and wd where not
    given. A group without trainable parameters is left out. Raises ValueError where there is none
    at all, and for a rate or decay of ghl layers where the model has no such layer.
    """
    check_module(model)
    layers = [module for module in model.modules() if isinstance(module, Plastic)]
    for name, value in (("lr_hebb", lr_hebb), ("wd_hebb", wd_hebb)):
        if value is not None and not layers:
            raise ValueError(
                f"{name} is {value!r}, but model is {type(model).__name__} without a ghl layer: "
                "call ghl.swap before"
            )
    weights = (layer._parameters.get("weight") for layer in layers)  # no parametrization's result
    hebbian = {id(w): w for w in weights if w is not None and w.requires_grad}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in hebbian]
    groups = [
        {
            "params": list(hebbian.values()),
            "lr": lr if lr_hebb is None else lr_hebb,
            "weight_decay": wd if wd_hebb is None else wd_hebb,
        },
        {"params": others, "lr": lr, "weight_decay": wd},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"model is {type(model).__name__} without a trainable parameter")
    return groups
