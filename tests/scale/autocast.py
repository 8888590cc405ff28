"""Scenarios of autocast: all ranks merge with weights in the dtype of the forwards; see `world`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import ghl

from .errors import assert_raises
from .nets import sgd
from .world import assert_equal_on_all_ranks, scenario


class Detour(nn.Module):
    """Two layers, of which the second is not always used, and may be used without autocast."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.always, self.second = ghl.Linear(8, 8), ghl.Linear(8, 8)
        self.exact = False

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        y = self.always(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.exact):
            return self.second(y.float()) if both else y


def step(wrapped: nn.Module, rank: int, *args: bool) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(rank))
    with torch.autocast("cpu", torch.bfloat16):
        y = wrapped(x, *args)
    y.float().square().sum().backward()


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
