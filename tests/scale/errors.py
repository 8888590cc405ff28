"""Scenarios that must be refused, on every rank; see `world`."""

from __future__ import annotations

import contextlib
import re

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP

import ghl

from .nets import batch, loss_of, make, sgd
from .world import assert_equal_on_all_ranks, scenario


def assert_raises(error: type[Exception], message: str, function: object, *args: object) -> None:
    try:
        function(*args)
    except error as raised:
        assert re.search(message, str(raised)), f"said {raised}"
    else:
        raise AssertionError(f"no {error.__name__}")


@scenario
def different_rules(rank: int, world: int) -> None:
    """Under FSDP as well."""
    message = r"ranks differ.*rank 0 of the group has 'first.0'.*tau=1.0.*rank 1 has.*tau=2.0"
    for sharded in (False, True):
        model = make("conv", ghl.Rule(tau=1.0 + (rank == 1)))
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        assert_raises(RuntimeError, message, ghl.synchronize, model, sgd(model))


@scenario
def different_shapes(rank: int, world: int) -> None:
    model = nn.Sequential(ghl.Linear(3, 4), ghl.Linear(4, 5 + (rank == 1)))
    message = r"rank 0 of the group has '1': \(5, 4\).*rank 1 has '1': \(6, 4\)"
    assert_raises(RuntimeError, message, ghl.synchronize, model, sgd(model))


@scenario
def different_numbers_of_layers(rank: int, world: int) -> None:
    model = nn.Sequential(*(ghl.Linear(3, 3) for _ in range(2 + (rank == 1))))
    message = "rank 0 of the group has communicate=None; rank 1 has '2'"
    assert_raises(RuntimeError, message, ghl.synchronize, model, sgd(model))


@scenario
def different_settings(rank: int, world: int) -> None:
    model = make("conv")
    wire = torch.bfloat16 if rank == 1 else None
    message = "has communicate=None; rank 1 has communicate=torch.bfloat16"
    assert_raises(RuntimeError, message, lambda: ghl.synchronize(model, sgd(model), None, wire))


@scenario
def nothing_to_synchronize_on_one_rank(rank: int, world: int) -> None:
    """That rank's error is told on all."""
    model = nn.Linear(3, 3) if rank == 1 else ghl.Linear(3, 3)
    message = "rank 1 has the error model is Linear without a weight that a rule"
    assert_raises(RuntimeError, message, ghl.synchronize, model, sgd(model))


@scenario
def forgotten_under_ddp(rank: int, world: int) -> None:
    x, target = batch("conv", 0)
    model = DDP(make("conv"))
    loss = loss_of(model(x), target)
    message = rf"process group of {world} ranks.*call ghl.synchronize\(model, optimizer\)"
    assert_raises(RuntimeError, message, loss.backward)


@scenario
def forgotten_under_fsdp(rank: int, world: int) -> None:
    """Whether swapped before or after sharding; also on a mesh of one rank."""
    x, _ = batch("conv", 0)
    message = r"sharded by FSDP.*call ghl.synchronize\(model, optimizer\)"
    for shape in ((world,), (world, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        before = fully_shard(make("conv"), mesh=mesh)
        assert_raises(RuntimeError, message, before, x)
        after = make("conv")
        ghl.unswap(after)
        fully_shard(after, mesh=mesh)
        ghl.swap(after)
        assert_raises(RuntimeError, message, after, x)
        with torch.no_grad():
            after(x)


@scenario
def sharded_on_another_dimension(rank: int, world: int) -> None:
    model = nn.Sequential(ghl.Linear(6, 6, bias=False))
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1))
    message = "must be sharded by fully_shard on dimension 0"
    assert_raises(ValueError, message, ghl.synchronize, model, sgd(model))


@scenario
def gradient_that_no_rank_has_sums_for(rank: int, world: int) -> None:
    """A weight used around its layer: an error at the step, not a step of zero."""
    layer = ghl.Linear(3, 3)
    optimizer = sgd(layer)
    ghl.synchronize(layer, optimizer)
    F.linear(torch.randn(4, 3), layer.weight).sum().backward()
    assert_raises(RuntimeError, "use the weight through its layer", optimizer.step)


@scenario
def rule_changed(rank: int, world: int) -> None:
    """On all ranks, and on one alone, for which none of the others waits."""
    for rule, of_all in (("hebb", True), ("bp", True), ("hebb", False), ("bp", False)):
        model = make("conv")
        optimizer = sgd(model)
        ghl.synchronize(model, optimizer)
        here = of_all or rank == 1
        if here:
            model.first[0].rule = rule
        message = r"a layer's rule is.*call remove\(\)" if here else "another rank could not"
        assert_raises(RuntimeError, message, optimizer.step)


@scenario
def sums_lost_on_one_rank(rank: int, world: int) -> None:
    """Its memory format was changed within an accumulation: the step is refused on all ranks, and
    the next one is made by all."""
    model = make("conv")
    wrapped, optimizer = DDP(model), sgd(model)
    ghl.synchronize(wrapped, optimizer)
    x, target = batch("conv", 0)
    loss_of(wrapped(x), target).backward()
    if rank == 1:
        model.first[0].to(memory_format=torch.channels_last)
    message = "whose sums are gone" if rank == 1 else "another rank could not"
    assert_raises(RuntimeError, message, optimizer.step)
    model.first[0].to(memory_format=torch.contiguous_format)
    optimizer.zero_grad()
    loss_of(wrapped(x), target).backward()
    optimizer.step()
    assert_equal_on_all_ranks(list(model.parameters()))


@scenario
def gradients_that_nobody_averages(rank: int, world: int) -> None:
    """On all ranks, once, whatever was forgotten; also where one group averages a part alone."""
    model = make("conv")
    optimizer = sgd(model)
    ghl.synchronize(model, optimizer)
    x, target = batch("conv", rank)
    loss_of(model(x), target).backward()
    message = "ranks differ, must have averaged the gradients of all weights.*'first.0': one of"
    for _ in range(2):  # whoever catches it and goes on
        assert_raises(RuntimeError, message, optimizer.step)


@scenario
def gradients_that_are_averaged_no_more(rank: int, world: int) -> None:
    """As local SGD does from some step on: looked for in the steps 1, 2, 4 and so on."""
    model = make("conv")
    wrapped, optimizer = DDP(model), sgd(model)
    ghl.synchronize(wrapped, optimizer)
    x, target = batch("conv", rank)
    for step in range(1, 5):
        optimizer.zero_grad()
        with wrapped.no_sync() if step == 4 else contextlib.nullcontext():
            loss_of(wrapped(x), target).backward()
        if step < 4:
            optimizer.step()
    assert_raises(RuntimeError, "must have averaged the gradients", optimizer.step)


@scenario
def gradients_that_no_backward_made(rank: int, world: int) -> None:
    for normalize in ("absmax", "mean"):
        model = make("conv", ghl.Rule(normalize=normalize))
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        optimizer = sgd(model)
        ghl.synchronize(model, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        message = "weight.grad of .* holds an ordinary gradient, because no layer"
        assert_raises(RuntimeError, message, optimizer.step)


@scenario
def weights_that_ddp_does_not_average(rank: int, world: int) -> None:
    a, b = make("conv"), ghl.Linear(5, 5, dtype=torch.float64)
    message = "weight of '1' is outside of DistributedDataParallel"
    model = nn.Sequential(DDP(a), b)
    assert_raises(ValueError, message, ghl.synchronize, model, sgd(model))


@scenario
def tensor_parallel(rank: int, world: int) -> None:
    """Neither where it is synchronized, nor where it is not, in whatever way it is sharded."""
    for plan in ({"0": ColwiseParallel()}, {"0": ColwiseParallel(), "1": RowwiseParallel()}):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        ghl.swap(model, types=nn.Linear)
        parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
        assert_raises(ValueError, "tensor parallelism", ghl.synchronize, model, sgd(model))
        assert_raises(RuntimeError, "DTensor in its forward", model, torch.randn(2, 6))


@scenario
def the_first_fsdp(rank: int, world: int) -> None:
    model = nn.Sequential(FullyShardedDataParallel(make("conv"), device_id=torch.device("cpu")))
    message = "FullyShardedDataParallel at '0', which is not supported.*fully_shard"
    assert_raises(ValueError, message, ghl.synchronize, model, sgd(model))


@scenario
def several_groups(rank: int, world: int) -> None:
    own = [dist.new_group([r]) for r in range(world)][rank]
    model = nn.Sequential(DDP(make("conv")), DDP(ghl.Linear(5, 5), process_group=own))
    message = "of several process groups, must have one"
    assert_raises(ValueError, message, ghl.synchronize, model, sgd(model))


@scenario
def join(rank: int, world: int) -> None:
    model = DDP(make("conv"))
    optimizer = sgd(model)
    ghl.synchronize(model, optimizer)
    x, target = batch("conv", 0)

    def joined() -> None:
        with model.join():
            loss_of(model(x), target).backward()
            optimizer.step()

    assert_raises(RuntimeError, r"model.join\(\) is not supported", joined)


@scenario
def sums_that_one_shard_lacks(rank: int, world: int) -> None:
    """The others' gradients are zeros, for which no sums are needed; none of them waits."""
    model = nn.Sequential(*(ghl.Linear(6, 6, dtype=torch.float64) for _ in range(2)))
    optimizer = sgd(fully_shard(model, mesh=init_device_mesh("cpu", (world,))))
    ghl.synchronize(model, optimizer)
    model.forward = lambda x: F.linear(model[0](x), model[1].weight)[:, :2]
    model(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    message = "because no layer" if rank == 0 else "another rank could not"
    assert_raises(RuntimeError, message, optimizer.step)


@scenario
def gradients_that_a_hook_reduces(rank: int, world: int) -> None:
    """Before ghl.synchronize or after it."""
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))["shard"]
    for after in (False, True):
        model = fully_shard(make("conv"), mesh=mesh)
        if not after:
            model.set_all_reduce_hook(dist.all_reduce)
        optimizer = sgd(model)
        ghl.synchronize(model, optimizer)
        if after:
            model.set_all_reduce_hook(dist.all_reduce)
        x, target = batch("conv", rank)
        loss_of(model(x), target).backward()
        assert_raises(RuntimeError, "set_all_reduce_hook .* is not supported", optimizer.step)
