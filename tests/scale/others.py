"""Scenarios of what is around a training loop: outputs, checkpoints, meshes; see `world`."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import ghl

from .ddp import OneBranch, step_of_one_rank
from .fsdp import ALONE
from .nets import FEW, batch, loss_of, make, sgd
from .world import assert_close, assert_equal_on_all_ranks, scenario


@dataclasses.dataclass
class Output:
    logits: Tensor


class Outputs(dict):
    """What pytree takes for one leaf."""


class Returning(nn.Module):
    """A branch with a rule, whose output comes as an object of others."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.net, self.kind = OneBranch(), kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(logits=self.net(x))


class Logits(nn.Module):
    """DistributedDataParallel, but for its output."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Tensor) -> Tensor:
        output = self.wrapped(x)
        return output["logits"] if isinstance(output, dict) else output.logits


@scenario
def outputs_of_other_types(rank: int, world: int) -> None:
    """A backward begins there also on a rank that uses no layer with a rule."""
    for kind in (Output, Outputs):
        model = Returning(kind)
        wrapped = DDP(model, find_unused_parameters=True)
        optimizer = sgd(model)
        ghl.synchronize(wrapped, optimizer)
        x, target = batch("branches", 0)
        loss_of(Logits(wrapped)(x + 1), target).backward()  # dropped
        step_of_one_rank(rank, world, Logits(wrapped), OneBranch(), optimizer)


@scenario
def state_of_an_optimizer_that_one_rank_saves(rank: int, world: int) -> None:
    """For which torch steps it, where it has no state, of gradients of zeros."""
    for rule in ("ghl", "sign"):
        model = make("conv", rule)
        wrapped, optimizer = DDP(model), sgd(model, momentum=0.0)
        ghl.synchronize(wrapped, optimizer)
        for step in range(2):
            if rank == 0:
                get_optimizer_state_dict(model, optimizer)
            x, target = batch("conv", step)
            loss_of(wrapped(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_equal_on_all_ranks(list(model.parameters()))


@scenario
def models_of_their_own(rank: int, world: int) -> None:
    """Sharded on a part of a mesh, which trains for as many steps as it likes."""
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("task", "shard"))["shard"]
    whole, model = make("conv"), fully_shard(make("conv"), mesh=mesh)
    for net in (whole, model):
        optimizer = sgd(net)
        if net is model:
            ghl.synchronize(net, optimizer)
        for step in range(1 + rank):
            optimizer.zero_grad()
            x, target = batch("conv", rank + step)
            if net is model:
                loss_of(net(x), target).backward()
            else:
                with ALONE:
                    loss_of(net(x), target).backward()
            optimizer.step()
    assert_close([p.full_tensor() for p in model.parameters()], list(whole.parameters()))


@scenario
def shards_of_a_rule_without_sums(rank: int, world: int) -> None:
    """FSDP writes gradients, and tells nobody: zeroed in place by one call, or forgotten."""
    largest = []
    model = fully_shard(make("conv", "sign"), mesh=init_device_mesh("cpu", (world,)))
    optimizer = sgd(model, foreach=True)
    ghl.synchronize(model, optimizer)
    x, target = batch("conv", 0)
    for _ in range(FEW):
        optimizer.zero_grad(set_to_none=False)
        for piece, wanted in zip(x.chunk(2), target.chunk(2), strict=True):
            loss_of(model(piece), wanted).backward()
        largest.append(model.first[0].weight.grad.full_tensor().abs().max())
        optimizer.step()
        assert model.first[0].weight.grad.full_tensor().abs().max() == 1
    assert all(number < 1 for number in largest)
    before = [p.full_tensor().clone() for p in model.parameters()]
    loss_of(model(x), target).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "still held the update" in str(error) or "another rank could not" in str(error)
    else:
        raise AssertionError("stepped with the sum of an update and a gradient")
    assert_close([p.full_tensor() for p in model.parameters()], before, 1e-300)
