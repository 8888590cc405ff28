"""What optimizers must not step with: gradients of which another one's step makes updates."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from ghl.deferred.held import HeldSums, is_owed
from ghl.sums import RawSums

living: weakref.WeakSet[Any] = weakref.WeakSet()  # Synchronizers
orphans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weights whose Synchronizer is gone
GONE = (
    "the optimizer that ghl.synchronize was given is gone, and nothing would make updates of "
    "gradients: call ghl.synchronize(model, optimizer) with the new one"
)


@torch.compiler.disable
def check_others(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    """The hook of every optimizer's step."""
    for synchronizer in list(living):
        synchronizer.check_other(optimizer)
    if orphans and owes(optimizer, {id(weight) for weight in orphans}):
        raise RuntimeError(GONE)


def owes(optimizer: Optimizer, weights: Collection[int]) -> bool:
    """Whether one of these weights, by id, has a gradient in it that awaits its update."""
    return any(
        id(p) in weights and isinstance(RawSums.present(p), HeldSums) and is_owed(p)
        for group in optimizer.param_groups
        for p in group["params"]
    )


def orphan(weights: Sequence[weakref.ref[nn.Parameter]], hooks: Sequence[Any]) -> None:
    """What is left to do when a handle goes with its optimizer."""
    orphans.update((w, None) for weight in weights if (w := weight()) is not None)
    for hook in hooks:
        hook.remove()
