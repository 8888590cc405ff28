"""Scenarios of autocast: all ranks merge with weights in the dtype of the forwards; see `world`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import ghl

from .errors import assert_raises
from .nets import sgd
from .world import assert_close, assert_equal_on_all_ranks, scenario


class Detour(nn.Module):
    """Two layers, of which the second is not always used, and may be used without autocast."""

    def __init__(self, rule: str | ghl.Rule = "ghl") -> None:
        torch.manual_seed(0)
        super().__init__()
        self.always, self.second = (ghl.Linear(8, 8, rule=rule) for _ in range(2))
        self.exact = False

    def forward(self, x: Tensor, both: bool = True, layer: bool = True) -> Tensor:
        y = self.always(x)
        autocast = torch.is_autocast_enabled("cpu") and not self.exact
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if not layer:
                return nn.functional.linear(y.float(), self.second.weight, self.second.bias)
            return self.second(y.float()) if both else y


def step(wrapped: nn.Module, rank: int, *args: bool, autocast: bool = True) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(rank))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = wrapped(x, *args)
    y.float().square().sum().backward()


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@scenario
def layer_that_one_rank_has_never_used(rank: int, world: int) -> None:
    model = Detour()
    wrapped, optimizer = DDP(model, find_unused_parameters=True), sgd(model)
    ghl.synchronize(wrapped, optimizer)
    for both in (True, False):
        optimizer.zero_grad()
        step(wrapped, rank, rank == 0 or not both)
        optimizer.step()
        assert_equal_on_all_ranks(list(model.parameters()))


@scenario
def layers_of_which_a_rank_has_used_none(rank: int, world: int) -> None:
    """Or another one, in another dtype."""
    for rule, exact in (("bp", False), ("ghl", True)):
        model = Detour()
        model.always.rule, model.exact = rule, exact
        wrapped, optimizer = DDP(model, find_unused_parameters=True), sgd(model)
        ghl.synchronize(wrapped, optimizer)
        step(wrapped, rank, rank == 0)
        optimizer.step()
        assert_equal_on_all_ranks(list(model.parameters()))


@scenario
def autocast_that_is_turned_on_and_off(rank: int, world: int) -> None:
    """With a layer that only one rank uses, and in another dtype at every step."""
    model = Detour()
    wrapped, optimizer = DDP(model, find_unused_parameters=True), sgd(model)
    ghl.synchronize(wrapped, optimizer)
    for autocast in (True, False, False, True, True, False):
        optimizer.zero_grad()
        step(wrapped, rank, rank == 0, autocast=autocast)
        optimizer.step()
        assert_equal_on_all_ranks(list(model.parameters()))


@scenario
def weight_that_a_rank_uses_without_its_layer(rank: int, world: int) -> None:
    """In another dtype than this rank's other layers: the same sharded as whole."""
    updates = []
    for wrap in (DDP, functools.partial(fully_shard, mesh=init_device_mesh("cpu", (world,)))):
        model = Detour(ghl.Rule(gate="hebb", normalize="none"))
        model.exact = True
        wrapped = wrap(model)
        handle = ghl.synchronize(wrapped, sgd(model))
        step(wrapped, rank, True, rank == 0)
        handle.merge()
        updates.append(whole(model.second.weight.grad))
    assert_close(updates[:1], updates[1:], 1e-5 * updates[0].abs().max().item())


@scenario
def layer_that_the_last_micro_batch_does_not_use(rank: int, world: int) -> None:
    """FSDP has yet to reduce what came before: of the dtype that it was used in then."""
    updates = []
    for wrap in (DDP, functools.partial(fully_shard, mesh=init_device_mesh("cpu", (world,)))):
        model = Detour(ghl.Rule(gate="hebb", normalize="none"))
        wrapped = wrap(model, find_unused_parameters=True) if wrap is DDP else wrap(model)
        handle = ghl.synchronize(wrapped, sgd(model))
        for both in (True, False):
            if wrap is not DDP:
                wrapped.set_requires_gradient_sync(not both)
            step(wrapped, rank, both)
        handle.merge()
        updates.append(whole(model.second.weight.grad))
    assert_close(updates[:1], updates[1:], 1e-5 * updates[0].abs().max().item())


@scenario
def forward_of_one_rank_before_the_step(rank: int, world: int) -> None:
    """Without autocast, to look at something; also between a forward and its backward."""
    for between in (False, True):
        model = Detour()
        wrapped, optimizer = DDP(model), sgd(model)
        ghl.synchronize(wrapped, optimizer)
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(rank))
        with torch.autocast("cpu", torch.bfloat16):
            loss = wrapped(x).float().square().sum()
        for look in (True, False) if between else (False, True):
            if look and rank == 0:
                model.always(x), model.second(x)
            elif not look:
                loss.backward()
        optimizer.step()
        assert_equal_on_all_ranks(list(model.parameters()))


@scenario
def forwards_in_different_dtypes(rank: int, world: int) -> None:
    model = Detour()
    wrapped, optimizer = DDP(model), sgd(model)
    ghl.synchronize(wrapped, optimizer)
    model.exact = rank == 1
    step(wrapped, rank)
    message = "must use a weight in one dtype: 'module.second' in torch.bfloat16 and in .*float32"
    assert_raises(RuntimeError, message, optimizer.step)
