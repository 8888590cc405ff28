"""`ghl.synchronize`: what it is given, looked at once, and by all ranks together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ghl import ranks
from ghl.deferred.groups import check_one_group, check_process_group, group_of
from ghl.deferred.shards import is_on_neurons, is_sharded
from ghl.deferred.synchronizer import Synchronizer, handle_of
from ghl.deferred.wrapped import check_wrapper, is_managed, stepping
from ghl.layers import Plastic, check_module
from ghl_kernels.layout import is_channels_last

WIRES = (None, torch.float32, torch.bfloat16)


def synchronize(
    model: nn.Module,
    optimizer: Optimizer,
    group: Any = None,
    communicate: torch.dtype | None = None,
) -> Synchronizer:
    """Make the updates of `model` in `optimizer.step()`, from all backwards and ranks before it.

    Call it once, on every rank, when the model is wrapped (DistributedDataParallel) or sharded
    (fully_shard) and its optimizer built. Until the step `weight.grad` is the ordinary gradient
    G, so whatever is done with that works as ever: accumulation over backwards with or without
    no_sync, averaging over ranks, GradScaler, clipping (of G, whose size does not reach the
    update). A hook before the step adds H0 and totals up over the ranks, merges all layers, and
    puts the updates into `weight.grad`. zero_grad() drops what is held, also without a step.

    optimizer: the one that steps, or what accelerate or Lightning have put around it.
    group: the process group whose ranks hold parts of one batch: that of DistributedDataParallel
        where `model` is or has one, of the mesh of one dimension that it is sharded on, else the
        default group. Its ranks must have the same layers, average the gradients of all weights,
        use them in the same dtypes, and step together; that they do is looked at in the steps 1, 2,
        4, 8 and so on. Sharded weights are added up over their own mesh.
    communicate: torch.bfloat16 halves the bytes of H0 on the wire, at a relative error of about
        2⁻⁸ for every rank's summand; totals are sent as they are.

    On the wire, for a weight of K neurons and N numbers, in float32: 4N + 4(K+5) bytes once a
    step beside DistributedDataParallel's 4N for every G that it averages; 4N + 8K beside FSDP's
    for every reduction of G, and 4 for absmax a step; 4 more tell whether a rank has an error,
    which is then one of all. It is no DDP communication hook: a compiled backward gives G and H0 in
    no set order, so H0 may not be there when a bucket is full; with no_sync H0 would be sent once
    too often; and the one hook that DDP takes stays the user's.

    Only zero_grad(), `weight.grad = None` and zeroing in place drop what is held: nothing tells of
    `weight.grad.data.zero_()`, and a gradient of zeros that is changed in place counts as zeroed.
    The decay is taken of the weight as it is in the step. Gradients must not be taken away and
    added back (as PCGrad does), nor be made by backward(inputs=) or autograd.grad. A forward counts
    as often as backwards go through it (retain_graph=True). An optimizer that uses gradients before
    it calls its closure, as SAM does, wants merge() on the handle before its step. Of a CUDA graph,
    forward, backward and step must be in the same one. Another optimizer's step raises while
    gradients are held; synchronize again, when none are, replaces the former.

    Over several ranks a hook on `model` (not if that is compiled) tells where a backward begins;
    remove() comes before another rule; model.join() is refused, as one that has joined would not
    add its sums.
    Returns a handle: `remove()` takes all hooks off, and the updates are made in backward again.
    Raises TypeError for what is no model, optimizer or group; ValueError where there is nothing to
    synchronize, or FullyShardedDataParallel or tensor parallelism; RuntimeError for weights that
    already are, and on all ranks where they differ in layers, dtypes, rules or `communicate`.
    """
    check_module(model)
    check_process_group(group)
    wanted, group = group, group_of(model, group)
    weights: dict[str, nn.Parameter] = {}
    try:
        optimizer = stepping(optimizer)
        if communicate not in WIRES:
            raise ValueError(f"communicate is {communicate}, must be one of {WIRES}")
        check_wrapper(model)
        weights = weights_of(model, optimizer, ranks.size(group) > 1)
        if wanted is None:
            check_one_group(model, weights)
        found = [
            f"{name!r}: {tuple(w.shape)} {w.dtype} {order_of(w)} {model.get_submodule(name).rule}"
            for name, w in weights.items()
        ] + [f"communicate={communicate}"]
    except (TypeError, ValueError, RuntimeError) as error:
        ranks.check_same([f"the error {error}"], group, model.parameters())
        raise
    ranks.check_same(found, group, weights.values())
    return Synchronizer(model, weights, optimizer, group, communicate)


def order_of(weight: nn.Parameter) -> str:
    """The memory order in which a weight's H0 is sent."""
    return "channels_last" if is_channels_last(weight) else "contiguous"


def weights_of(
    model: nn.Module, optimizer: Optimizer, averaged: bool = False
) -> dict[str, nn.Parameter]:
    """Weights of layers with a rule that `optimizer` trains, by name, each once.

    Frozen ones may be thawed: they are among them where they can be.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in model.named_modules():
        ruled = isinstance(module, Plastic) and module.rule.makes_update
        if ruled and id(module.weight) in trained:
            found.setdefault(id(module.weight), (name, module.weight))
    replaced = {handle_of(weight) for _, weight in found.values() if weight.requires_grad}
    weights = {
        name: weight
        for name, weight in found.values()
        if weight.requires_grad
        or (handle_of(weight) in (None, *replaced) and may_be_thawed(weight, averaged))
    }
    if not weights:
        raise ValueError(
            f"model is {type(model).__name__} without a weight that a rule and the optimizer "
            "train; swap, wrap or shard the model first, then build the optimizer"
        )
    ids = {id(weight) for weight in weights.values()}
    for name, weight in weights.items():
        if is_sharded(weight) and not is_managed(model, name):
            raise ValueError(
                f"weight of {name!r} is a DTensor that fully_shard has not made (tensor "
                "parallelism?), which is not supported: give the layer rule='bp'"
            )
        former = handle_of(weight)
        if former is not None and not former.may_be_replaced(ids):
            raise RuntimeError(
                f"weight of {name!r} is synchronized already, with others or with gradients that "
                "await a step: call zero_grad(), or remove() on that handle, first"
            )
    return weights


def may_be_thawed(weight: nn.Parameter, averaged: bool) -> bool:
    """Not where DistributedDataParallel averages gradients, which leaves out what was frozen."""
    return is_on_neurons(weight) if isinstance(weight, DTensor) else not averaged
