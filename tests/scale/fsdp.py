"""Scenarios of FSDP2's fully_shard; see `world`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import ghl

from .ddp import parts
from .nets import BATCH, FEW, STEPS, alone, batch, loss_of, make, sgd
from .world import assert_close, assert_equal_on_all_ranks, scenario

ALONE = mock.patch.object(torch.distributed, "is_initialized", lambda: False)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Every block apart, and what is left with the root."""
    for block in getattr(model, "blocks", [*model.children()][:-1]):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def train(
    world: int,
    name: str = "conv",
    rank: int = 0,
    micro: int = 1,
    last_only: bool = False,
    clip: float | None = None,
    backend: str | None = None,
    scaler: torch.amp.GradScaler | None = None,
    none: bool = True,
    model: nn.Module | None = None,
    steps: int = STEPS,
    **options: Any,
) -> list[Tensor]:
    """Steps under fully_shard; the whole parameters of the end."""
    options.setdefault("mesh", init_device_mesh("cpu", (world,)))
    model = shard(model or make(name), **options)
    optimizer = sgd(model)
    ghl.synchronize(model, optimizer)
    forward = torch.compile(model, backend=backend) if backend else model
    for step in range(steps):
        x, target = parts(rank, world, *batch(name, step), [BATCH // world] * world)
        optimizer.zero_grad(set_to_none=none)
        pieces = list(zip(x.chunk(micro), target.chunk(micro), strict=True))
        for number, (piece, wanted) in enumerate(pieces):
            model.set_requires_gradient_sync(not last_only or number == micro - 1)
            loss = loss_of(forward(piece), wanted, world)
            (scaler.scale(loss) if scaler else loss).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    whole = [p.full_tensor() for p in model.parameters()]
    assert_equal_on_all_ranks(whole)
    return whole


@scenario
def one_backward(rank: int, world: int) -> None:
    """Shards of 7 neurons are uneven; of 4 over three ranks, one is empty."""
    for name in ("conv", "transformer"):
        assert_close(train(world, name, rank), alone(name))


@scenario
def accumulation(rank: int, world: int) -> None:
    """Four backwards, of which all or only the last are reduced by FSDP."""
    for name, last_only in (("conv", False), ("conv", True), ("transformer", True)):
        assert_close(train(world, name, rank, micro=4, last_only=last_only), alone(name))


@scenario
def gradients_zeroed_in_place(rank: int, world: int) -> None:
    assert_close(train(world, rank=rank, micro=2, none=False, steps=FEW), alone("conv", steps=FEW))


@scenario
def dropped_batch_before_one_that_is_not_reduced(rank: int, world: int) -> None:
    """zero_grad drops what was reduced; what was not, FSDP keeps of G, and so does H0."""
    updates = []
    for drop in (False, True):
        model = shard(make("branches"), mesh=init_device_mesh("cpu", (world,)))
        optimizer = sgd(model)
        ghl.synchronize(model, optimizer)
        x, target = batch("branches", 0)
        if drop:
            loss_of(model(2 * x + 1), target).backward()
        model.set_requires_gradient_sync(False)
        loss_of(model(x + 1), target).backward()
        optimizer.zero_grad()
        model.set_requires_gradient_sync(True)
        loss_of(model(x - 1), target).backward()  # without the branch
        optimizer.step()
        updates.append([p.grad.full_tensor() for p in model.parameters()])
    assert_close(*updates)


@scenario
def zeroed_where_no_version_tells(rank: int, world: int) -> None:
    """zero_grad of a foreach or fused optimizer zeroes many DTensors at once."""
    model = shard(make("conv"), mesh=init_device_mesh("cpu", (world,)))
    optimizer = sgd(model, foreach=True)
    ghl.synchronize(model, optimizer)
    for step in range(FEW):
        x, target = batch("conv", step)
        optimizer.zero_grad(set_to_none=False)
        loss_of(model(1 - x), target).backward()
        optimizer.zero_grad(set_to_none=False)  # dropped
        loss_of(model(x), target).backward()
        optimizer.step()
    assert_close([p.full_tensor().detach() for p in model.parameters()], alone("conv", steps=FEW))


@scenario
def converted(rank: int, world: int) -> None:
    """Any number of times, but not while it is synchronized."""
    model = shard(make("conv"), mesh=init_device_mesh("cpu", (world,)))
    model.float().double()
    model.load_state_dict(shard(make("conv"), mesh=init_device_mesh("cpu", (world,))).state_dict())
    handle = ghl.synchronize(model, sgd(model))
    with pytest.raises(RuntimeError, match=r"cannot be moved or converted in .*: call remove"):
        model.to("cpu")
    handle.remove()
    model.float().double()
    handle = ghl.synchronize(model, optimizer := sgd(model))
    x, target = batch("conv", 0)
    loss_of(model(x), target).backward()
    optimizer.step()
    whole = make("conv")
    with ALONE:
        loss_of(whole(x), target).backward()
    given = [p.grad.full_tensor() for p in model.parameters()]
    assert_close(given, [p.grad for p in whole.parameters()], 1e-6)  # after float()


@scenario
def gradients_of_zeros_around_a_checkpoint(rank: int, world: int) -> None:
    """H0 that was reduced in the backward around outlives that of a reentrant checkpoint."""
    updates = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        first, second = (ghl.Linear(6, 6, rule="hebb", dtype=torch.float64) for _ in range(2))
        model = nn.ModuleList([first, second])
        for layer in model:
            fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
        optimizer = sgd(model)
        ghl.synchronize(model, optimizer)
        x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        hidden = checkpoint(first, x, use_reentrant=True) if checkpointed else first(x)
        (second(hidden) * 0).sum().backward()
        optimizer.step()
        updates.append([layer.weight.grad.full_tensor() for layer in model])
        assert all(update.any() for update in updates[-1])
    assert_close(*updates)


@scenario
def micro_batches_without_a_gradient(rank: int, world: int) -> None:
    """As under DDP; for a shard of neurons that are silent as well."""
    share = BATCH // world
    for rule in ("ghl", "hebb")[: 4 - world]:
        whole = make("conv", rule)
        x, target = batch("conv", 0)
        target[torch.arange(BATCH) % share < share // 4 * 3] = -100  # which counts for nothing
        with ALONE:
            loss_of(whole(x), target).backward()
        model = shard(make("conv", rule), mesh=init_device_mesh("cpu", (world,)))
        optimizer = sgd(model)
        ghl.synchronize(model, optimizer)
        own = parts(rank, world, x, target, [share] * world)
        for piece, wanted in zip(*(t.chunk(4) for t in own), strict=True):
            loss_of(model(piece), wanted, world).backward()
        optimizer.step()
        given = [p.grad.full_tensor() for p in model.parameters()]
        assert_close(given, [p.grad for p in whole.parameters()])


@scenario
def not_resharded_after_forward(rank: int, world: int) -> None:
    given = train(world, rank=rank, reshard_after_forward=False, steps=FEW)
    assert_close(given, alone("conv", steps=FEW))


@scenario
def other_rules(rank: int, world: int) -> None:
    for rule in (ghl.Rule(normalize="mean"), ghl.Rule(gate="hebb"), ghl.Rule(gate="sign_only")):
        given = train(world, rank=rank, micro=2, model=make("conv", rule), steps=FEW)
        assert_close(given, alone("conv", rule, steps=FEW))


@scenario
def gradient_clipping(rank: int, world: int) -> None:
    assert_close(train(world, rank=rank, clip=0.05, steps=FEW), alone("conv", clip=0.05, steps=FEW))


@scenario
def activation_checkpointing(rank: int, world: int) -> None:
    model = make("conv")
    model.checkpointed = True
    assert_close(train(world, rank=rank, micro=2, model=model, steps=FEW), alone("conv", steps=FEW))


@scenario
def grad_scaler(rank: int, world: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    assert_close(train(world, rank=rank, micro=2, scaler=scaler), alone("conv"))


@scenario
def overflow_in_one_shard(rank: int, world: int) -> None:
    """Every rank skips the step, and none waits for another; what was held is gone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = shard(make("conv"), mesh=init_device_mesh("cpu", (world,)))
    optimizer = sgd(model)
    ghl.synchronize(model, optimizer)
    weight = model.first[0].weight
    before = weight.to_local().clone()
    x, target = batch("conv", 7)
    scaler.scale(loss_of(model(x), target)).backward()
    if rank == 1:
        weight.grad.to_local()[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_close([weight.to_local()], [before], 1e-300)
    optimizer.zero_grad()
    x, target = parts(rank, world, *batch("conv", 0), [BATCH // world] * world)
    scaler.scale(loss_of(model(x), target, world)).backward()
    scaler.step(optimizer)
    given = [p.grad.full_tensor() for p in (weight, model.second[0].weight)]
    whole = make("conv")
    with ALONE:
        loss_of(whole(batch("conv", 0)[0]), batch("conv", 0)[1]).backward()
    assert_close(given, [whole.first[0].weight.grad, whole.second[0].weight.grad])


@scenario
def compiled(rank: int, world: int) -> None:
    assert_close(train(world, rank=rank, backend="aot_eager"), alone("conv"))


@scenario
def shards_and_replicas(rank: int, world: int) -> None:
    """A mesh of two dimensions: whole copies over the first, shards over the second."""
    for shape in ((world, 1), (1, world)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        assert_close(
            train(world, rank=rank, micro=2, mesh=mesh, steps=FEW), alone("conv", steps=FEW)
        )


@scenario
def mixed_precision(rank: int, world: int) -> None:
    """bfloat16 in the forward, float32 sums: the numbers of one process under autocast."""
    rule = ghl.Rule(gate="hebb", normalize="none")
    x, target = batch("conv", 0, torch.float32)
    whole, model = (make("conv", rule, torch.float32) for _ in range(2))
    with ALONE:
        with torch.autocast("cpu", torch.bfloat16):
            y = whole(x)
        loss_of(y, target).backward()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mesh=init_device_mesh("cpu", (world,)), mp_policy=policy)
    handle = ghl.synchronize(model, sgd(model))
    x, target = parts(rank, world, x, target, [BATCH // world] * world)
    loss_of(model(x), target, world).backward()
    handle.merge()
    for layer, other in ((model.first[0], whole.first[0]), (model.second[0], whole.second[0])):
        given, expected = layer.weight.grad.full_tensor(), other.weight.grad
        assert given.dtype == torch.float32
        assert_close([given], [expected], 1e-5 * expected.abs().max().item())


def silent(rule: str) -> nn.Module:
    """Of a layer's neurons the latter half has no gradient, of inputs that are positive."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5)).double()
    with torch.no_grad():
        model[0].weight[2:] = -model[0].weight[2:].abs()
        model[0].bias[2:] = -0.1
    ghl.swap(model, rule, types=nn.Linear)
    return model


Backward = Callable[[float], None]


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Backward) -> None:
    backward(1.0)
    for p in model.parameters():
        p.grad.div_(8)


def scaled_within(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Backward) -> None:
    scaled(model, optimizer, backward)
    backward(-1.0)


def dropped(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Backward) -> None:
    backward(1.0)
    optimizer.zero_grad(set_to_none=False)
    backward(-1.0)


def dropped_silence(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Backward) -> None:
    backward(0.0)
    for p in model.parameters():
        p.grad.zero_()
    backward(-1.0)


@scenario
def shards_of_silent_neurons(rank: int, world: int) -> None:
    """Gradients of zeros are changed in place: scaled, or zeroed?"""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(BATCH, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (BATCH,), generator=generator)
    for rule, loop, foreach in (
        ("hebb", scaled, False), ("ghl", scaled_within, False), ("ghl", dropped, True),
        ("hebb", dropped, False), ("hebb", dropped_silence, False),
    ):  # fmt: skip
        whole, model = silent(rule), silent(rule)
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        own = parts(rank, world, x, target, [BATCH // world] * world)
        for net, images, wanted, scale in ((whole, x, target, 1), (model, *own, world)):

            def backward(
                sign: float, net: Any = net, x: Any = images, y: Any = wanted, scale: int = scale
            ) -> None:
                (loss_of(net((sign or 1.0) * x), y, scale) * abs(sign)).backward()

            optimizer = sgd(net, foreach=foreach)
            with contextlib.nullcontext() if net is model else ALONE:
                ghl.synchronize(net, optimizer)
                loop(net, optimizer, backward)
                optimizer.step()
        given = [p.grad.full_tensor() for p in model.parameters()]
        assert_close(given, [p.grad for p in whole.parameters()])
