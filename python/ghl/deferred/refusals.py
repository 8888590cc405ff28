"""What a step must not meet where its updates are made of sums: each an error with a remedy.

Looked for before anything is sent to other ranks or taken from what is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ghl import ranks
from ghl.deferred.held import REPLACED, is_owed
from ghl.deferred.shards import is_sharded
from ghl.guards import is_update
from ghl.layers import Plastic
from ghl.sums import ImmediateSums, RawSums, described
from ghl_kernels import Rule

USED_EARLY = (
    "the optimizer has changed weights before it called its closure, while ordinary gradients were "
    "held, of which no updates were made: before such a step call merge() on the handle of "
    "ghl.synchronize, or zero_grad() if it does not use them"
)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_join(wrappers: Iterable[DistributedDataParallel]) -> None:
    """Ranks that have joined send what DistributedDataParallel does, and nothing of ours."""
    if any(wrapper._join_config.enable for wrapper in wrappers):
        raise RuntimeError(
            "model.join() is not supported by ghl.synchronize: a rank that has joined would not "
            "add its sums; give all ranks the same number of batches"
        )


def check_rules(agreed: Sequence[tuple[Plastic, Rule]]) -> None:
    """With other rules this rank would send other messages than the others."""
    for layer, rule in agreed:
        present = getattr(layer, "_rule", None)
        if present != rule:
            raise RuntimeError(
                f"a layer's rule is {present}, was {rule} when ranks agreed on it: call remove(), "
                "set the rule and call ghl.synchronize again, on every rank"
            )


def check_group(weights: Iterable[nn.Parameter]) -> None:
    """Where there was no process group: there must still be none whose ranks hold parts of G."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and not all(map(is_sharded, weights)):
        raise RuntimeError(
            "a process group was made after ghl.synchronize, whose sums would not be added up over "
            "its ranks: call remove() and ghl.synchronize again, on every rank"
        )


def check_lost(weights: Iterable[nn.Parameter]) -> None:
    """A gradient must not pass for an update because nothing holds its sums any more."""
    for weight in weights:
        if RawSums.present(weight) is None and is_owed(weight):
            raise RuntimeError(REPLACED)


def check_early(optimizer: Optimizer | None, model: nn.Module | None) -> None:
    """What clips or scales a model's gradients must not have met an update that backward made."""
    found = [
        p
        for group in (optimizer.param_groups if optimizer else ())
        for p in group["params"]
        if is_update(p.grad) and isinstance(RawSums.present(p), ImmediateSums)
    ]
    layers = model.modules() if found and model is not None else ()
    own = {id(layer._parameters.get("weight")) for layer in layers if isinstance(layer, Plastic)}
    if early := [p for p in found if id(p) in own]:
        raise RuntimeError(
            f"the update of {', '.join(map(described, early))} was made in backward: its layer was "
            "added to the model or the optimizer, or given a rule, after ghl.synchronize; call "
            "remove() on the handle and ghl.synchronize again"
        )


def check_reducers(groups: Iterable[Any]) -> None:
    """fully_shard's groups of parameters: what else reduces their gradients must reduce H0."""
    if any(getattr(group, "_all_reduce_hook", None) is not None for group in groups):
        raise RuntimeError(
            "set_all_reduce_hook of fully_shard is not supported by ghl.synchronize: it reduces "
            "gradients, and not what is held beside them; shard on a mesh of two dimensions"
        )


def check_averaged(weights: Mapping[str, nn.Parameter], group: Any) -> None:
    """A gradient that only some of the group's ranks averaged is not the sums'."""
    whole = {name: weight for name, weight in weights.items() if not is_sharded(weight)}
    found = [
        f"{name!r}: " + ("none" if weight.grad is None else f"one of bits {bits(weight.grad):x}")
        for name, weight in whole.items()
    ]
    must = "have averaged the gradients of all weights"
    ranks.check_same(found, group, whole.values(), must)


def bits(t: Tensor) -> int:
    """The sum of a tensor's numbers as integers, which takes them in any order: a sum of floats
    would differ where ranks have other threads or GPUs."""
    return int(t.view(INTEGERS[t.element_size()]).sum()) % 2**64


def before_closure(weights: Iterable[nn.Parameter]) -> Callable[[], None]:
    """What raises, before a step's closure is called first, where the optimizer has used gradients
    that await their updates already, as SAM does."""
    waiting = [(w, w._version) for w in weights if w.grad is not None and not is_update(w.grad)]

    def check() -> None:
        if any(weight._version != version for weight, version in waiting):
            raise RuntimeError(USED_EARLY)
        waiting.clear()

    return check
