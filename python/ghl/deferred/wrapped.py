"""What others put around models, optimizers and outputs: looked through, told apart, refused."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves


def stepping(optimizer: Any) -> Optimizer:
    """The optimizer whose step calls its hooks: `optimizer`, or what it is put around."""
    found = optimizer
    while (inner := inside(found)) is not None:
        found = inner
    if isinstance(found, Optimizer) and hasattr(found, "_optimizer_step_pre_hooks"):
        found._patch_step_function()  # as zero_grad does where no __init__ has: timm's Lookahead
    if not (isinstance(found, Optimizer) and steps_with_hooks(found)):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer is a {kind}, must be a torch.optim.Optimizer, or hold one")
    return found


def steps_with_hooks(optimizer: Any) -> bool:
    """Not where a class does without what Optimizer makes of it and of its step."""
    return getattr(getattr(type(optimizer), "step", None), "hooked", False)


def inside(optimizer: Any) -> Optimizer | None:
    """The optimizer that another one is put around, unless that one's step calls hooks itself."""
    if steps_with_hooks(optimizer):
        return None
    held = [getattr(optimizer, name, None) for name in ("optimizer", "optim")]
    return next((one for one in held if isinstance(one, Optimizer) and one is not optimizer), None)


def check_wrapper(model: nn.Module) -> None:
    """Raise ValueError for a model in the first FSDP, by the name of its class: importing it takes
    long."""
    for name, module in model.named_modules():
        where = f" at {name!r}" if name else ""
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
            raise ValueError(
                f"model has FullyShardedDataParallel{where}, which is not "
                "supported: shard it by torch.distributed.fsdp.fully_shard"
            )


def is_managed(model: nn.Module, name: str) -> bool:
    """Whether fully_shard, or what is built on it, has the weight of a layer."""
    if getattr(model.get_submodule(name), "_is_fsdp_managed_module", False):
        return True
    return any(True for _ in sharders_of(model))


def sharders_of(model: nn.Module) -> Iterator[Any]:
    """The modules of a model that fully_shard was called for."""
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
        yield from (m for m in model.modules() if isinstance(m, fsdp.FSDPModule))


def reducers_of(model: nn.Module) -> Iterator[Any]:
    """fully_shard's groups of parameters whose gradients are reduced as one."""
    for module in sharders_of(model):
        state = module._get_fsdp_state()
        several = getattr(state, "_fsdp_param_groups", None)
        groups = [state._fsdp_param_group] if several is None else several
        yield from (group for group in groups if group is not None)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Those that a module has returned, also as values of what pytree does not know."""
    for leaf in tree_leaves(output):
        values: Iterable[Any] = (leaf,)
        if dataclasses.is_dataclass(leaf):
            values = (getattr(leaf, field.name, None) for field in dataclasses.fields(leaf))
        elif isinstance(leaf, dict):
            values = leaf.values()
        yield from (value for value in values if isinstance(value, Tensor))


def makes_state() -> bool:
    """Whether the optimizer's step is that of torch.distributed.checkpoint.state_dict, which has
    gradients of zeros and a learning rate of zero, for a state to be there; perhaps on one rank."""
    saving: Any = sys.modules.get("torch.distributed.checkpoint.state_dict")
    return saving is not None and any(
        frame.f_code.co_name == "_init_optim_state" and frame.f_code.co_filename == saving.__file__
        for frame, _ in traceback.walk_stack(sys._getframe())
    )
