"""Which process group's ranks hold the parts of one batch, as the wrappers of a model tell."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ghl.deferred.shards import is_sharded


def check_process_group(group: Any) -> None:
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group is {group!r}, must be a torch.distributed.ProcessGroup or None")


def group_of(model: nn.Module, group: Any) -> Any:
    """The process group that shares a batch; None without one."""
    if group is not None or not (dist.is_available() and dist.is_initialized()):
        return group
    for wrapper in wrappers_of(model):
        return wrapper.process_group
    parameters = [*model.parameters()]
    meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in parameters}
    mesh = meshes.pop() if len(meshes) == 1 else None
    if mesh is None or mesh.ndim > 1 or mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return mesh.get_group()


def wrappers_of(model: nn.Module) -> list[DistributedDataParallel]:
    return [m for m in model.modules() if isinstance(m, DistributedDataParallel)]


def check_one_group(model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Raise ValueError where not one group's ranks average the gradients of all weights."""
    wrappers = wrappers_of(model)
    if not wrappers:
        return
    if len({id(wrapper.process_group) for wrapper in wrappers}) > 1:
        raise ValueError(
            "model has DistributedDataParallel of several process groups, must have one: call "
            "ghl.synchronize for each of them, with an optimizer of its own"
        )
    averaged = {id(p) for wrapper in wrappers for p in wrapper.parameters()}
    for name, weight in weights.items():
        if weight.requires_grad and id(weight) not in averaged and not is_sharded(weight):
            raise ValueError(
                f"weight of {name!r} is outside of DistributedDataParallel, which averages the "
                "gradients of others: wrap the whole model, or pass the `group` whose ranks you "
                "average all gradients over"
            )
