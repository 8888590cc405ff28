"""Scenarios of weights frozen at first and thawed later, as in fine-tuning; see `world`."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP

import ghl

from .ddp import parts
from .fsdp import shard
from .nets import BATCH, batch, loss_of, make, sgd
from .world import assert_close, scenario


class Whole:
    """One process with the whole batch, beside ranks that do the same with their parts."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.net = rank, world, make("conv")
        self.optimizer = sgd(self.net)

    def step(self, number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        x, target = batch("conv", number)
        with mock.patch.object(torch.distributed, "is_initialized", lambda: False):
            loss_of(self.net(x), target).backward()
        sizes = [BATCH // self.world] * self.world
        own = parts(self.rank, self.world, x, target, sizes)
        loss_of(model(own[0]), own[1], self.world).backward()
        for one in (optimizer, self.optimizer):
            one.step()
            one.zero_grad()


@scenario
def under_ddp(rank: int, world: int) -> None:
    """Which leaves frozen weights out: the model is wrapped and synchronized anew."""
    whole, model = Whole(rank, world), make("conv")
    optimizer = sgd(model)
    for number, frozen in enumerate((True, False)):
        for net in (model, whole.net):
            net.first.requires_grad_(not frozen)
        wrapped = DDP(model)
        handle = ghl.synchronize(wrapped, optimizer)
        whole.step(number, wrapped, optimizer)
        handle.remove()
    assert_close(list(model.parameters()), list(whole.net.parameters()))


@scenario
def under_fsdp(rank: int, world: int) -> None:
    """A weight has its sums over all ranks from then on."""
    whole, model = Whole(rank, world), make("conv")
    model.first.requires_grad_(False)
    model = shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = sgd(model)
    ghl.synchronize(model, optimizer)
    for number, frozen in enumerate((True, False, False)):
        for net in (model, whole.net):
            net.first.requires_grad_(not frozen)
        whole.step(number, model, optimizer)
    given = [p.full_tensor().detach() for p in model.parameters()]
    assert_close(given, list(whole.net.parameters()))
