"""Scenarios of DistributedDataParallel; see `world`."""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import ghl
from ghl.recipes.distributed import spread

from .nets import BATCH, FEW, STEPS, Branches, alone, batch, loss_of, make, sgd
from .world import assert_close, assert_equal_on_all_ranks, scenario


def parts(rank: int, world: int, x: Tensor, target: Tensor, sizes: Sequence[int]) -> Any:
    """This rank's images and targets; sizes: how many images each rank has."""
    start = sum(sizes[:rank])
    return x[start : start + sizes[rank]], target[start : start + sizes[rank]]


def train(
    rank: int,
    world: int,
    name: str = "conv",
    micro: int = 1,
    no_sync: bool = False,
    sizes: Sequence[int] | None = None,
    clip: float | None = None,
    backend: str | None = None,
    communicate: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    none: bool = True,
    model: nn.Module | None = None,
    steps: int = STEPS,
    **options: Any,
) -> list[Tensor]:
    """Steps under DDP; each rank has its share of a batch, in micro-batches."""
    model = model or make(name)
    wrapped = DDP(model, **options)
    optimizer = sgd(model)
    ghl.synchronize(wrapped, optimizer, communicate=communicate)
    forward = torch.compile(wrapped, backend=backend) if backend else wrapped
    for step in range(steps):
        x, target = parts(rank, world, *batch(name, step), sizes or [BATCH // world] * world)
        optimizer.zero_grad(set_to_none=none)
        pieces = list(zip(x.chunk(micro), target.chunk(micro), strict=True))
        for number, (piece, wanted) in enumerate(pieces):
            last = number == len(pieces) - 1
            with contextlib.nullcontext() if last or not no_sync else wrapped.no_sync():
                loss = loss_of(forward(piece), wanted, world)
                (scaler.scale(loss) if scaler else loss).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    assert_equal_on_all_ranks(list(model.parameters()))
    return list(model.parameters())


class OneBranch(Branches):
    """Only its branch has a rule."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.to(torch.float64)
        ghl.swap(self.branch)


@scenario
def one_backward(rank: int, world: int) -> None:
    """Both networks."""
    for name in ("conv", "transformer"):
        assert_close(train(rank, world, name), alone(name))


@scenario
def gradients_of_a_recipe_do_not_depend_on_the_step(rank: int, world: int) -> None:
    """Nor does a run that is resumed: DDP has other buckets from the second step on."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 31), nn.Tanh(), nn.Linear(31, 5))
    model = spread(net, torch.device("cpu"), fsdp=False)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(9, 7, generator=generator)
    found = []
    for _ in range(3):
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for first, other in zip(found[0], found[-1], strict=True):
        assert torch.equal(first, other)
    assert_equal_on_all_ranks(found[0])


@scenario
def accumulation(rank: int, world: int) -> None:
    """Four backwards, of which all or only the last are averaged by DDP."""
    for name in ("conv", "transformer"):
        for no_sync in (False, True):
            assert_close(train(rank, world, name, micro=4, no_sync=no_sync), alone(name))


@scenario
def accumulation_with_gradients_zeroed_in_place(rank: int, world: int) -> None:
    given = train(rank, world, micro=4, no_sync=True, none=False, gradient_as_bucket_view=True)
    assert_close(given, alone("conv"))


@scenario
def gradient_as_bucket_view(rank: int, world: int) -> None:
    given = train(rank, world, micro=2, no_sync=True, gradient_as_bucket_view=True)
    assert_close(given, alone("conv"))


@scenario
def static_graph(rank: int, world: int) -> None:
    for view in (False, True):
        given = train(rank, world, static_graph=True, gradient_as_bucket_view=view, steps=FEW)
        assert_close(given, alone("conv", steps=FEW))


@scenario
def find_unused_parameters(rank: int, world: int) -> None:
    """A branch that some ranks, and in some steps all, do not use."""
    for view in (False, True):
        for micro in (1, 4):
            given = train(
                rank, world, "branches", micro=micro, no_sync=micro > 1,
                find_unused_parameters=True, gradient_as_bucket_view=view,
            )  # fmt: skip
            assert_close(given, alone("branches"))


@scenario
def dropped_batch_before_an_unused_branch(rank: int, world: int) -> None:
    """What a rank held of a branch is gone with zero_grad, also where the step does not use it, nor
    any other layer with a rule."""
    for others, none in itertools.product(("ghl", "bp"), (True, False)):
        model, whole = make("branches"), make("branches")
        for net in (model, whole):
            net.stem[0].rule = net.head[1].rule = others
        wrapped, optimizer = DDP(model, find_unused_parameters=True), sgd(model)
        ghl.synchronize(wrapped, optimizer)
        x, target = batch("branches", 0)
        loss_of(wrapped(x + 1), target).backward()
        step_of_one_rank(rank, world, wrapped, whole, optimizer, none)


@scenario
def thawed_branch_that_one_rank_uses(rank: int, world: int) -> None:
    """Its sums went when it was loaded frozen; all ranks make them anew, and send the same."""
    model, whole = make("branches"), make("branches")
    wrapped, optimizer = DDP(model, find_unused_parameters=True), sgd(model)
    ghl.synchronize(wrapped, optimizer)
    model.branch.requires_grad_(False)
    model.load_state_dict(whole.state_dict())
    model.branch.requires_grad_(True)
    step_of_one_rank(rank, world, wrapped, whole, optimizer)


def step_of_one_rank(
    rank: int,
    world: int,
    wrapped: nn.Module,
    whole: nn.Module,
    optimizer: torch.optim.Optimizer,
    none: bool = True,
) -> None:
    """A step in which only the first rank's images take the branch is that of one process.

    Gradients are zeroed between its forward and its backward."""
    x, target = batch("branches", 0)
    images = x + (torch.arange(BATCH) < BATCH // world).double().sub(0.5).view(-1, 1, 1, 1)
    x, wanted = parts(rank, world, images, target, [BATCH // world] * world)
    assert (x.flatten(1).mean(1) > 0.1).any() == (rank == 0)
    loss = loss_of(wrapped(x), wanted, world)
    optimizer.zero_grad(none)
    loss.backward()
    optimizer.step()
    with mock.patch.object(torch.distributed, "is_initialized", lambda: False):
        loss_of(whole(images), target).backward()
    assert_close([p.grad for p in wrapped.parameters()], [p.grad for p in whole.parameters()])


@scenario
def branch_of_one_rank_then_of_all(rank: int, world: int) -> None:
    """Micro-batches after an update that was zeroed in place, into which DDP writes others' G."""
    model, whole = make("branches"), make("branches")
    wrapped, optimizer = DDP(model, find_unused_parameters=True), sgd(model)
    ghl.synchronize(wrapped, optimizer)
    x, target = batch("branches", 0)
    loss_of(wrapped(x + 1), target).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    whole.load_state_dict(model.state_dict())
    first_rank = torch.arange(BATCH) < BATCH // world
    micro = [x + first_rank.double().sub(0.5).view(-1, 1, 1, 1), x + 1]
    for images in micro:
        own, wanted = parts(rank, world, images, target, [BATCH // world] * world)
        loss_of(wrapped(own), wanted, world).backward()
    optimizer.step()
    with mock.patch.object(torch.distributed, "is_initialized", lambda: False):
        loss_of(whole(torch.cat(micro)), target.repeat(2)).backward()
    assert_close([p.grad for p in model.parameters()], [p.grad for p in whole.parameters()])


@scenario
def backwards_that_add_nothing(rank: int, world: int) -> None:
    """Beside updates that are not zeroed yet: of inputs, of a frozen model, of a copy; and hooks on
    outputs stay nobody's but the model's."""
    model = make("branches")
    handle = ghl.synchronize(model, optimizer := sgd(model))
    x, target = batch("branches", 0)  # the same on all ranks
    x = (x + 1).requires_grad_()
    loss_of(model(x), target).backward()
    optimizer.step()
    update = model.stem[0].weight.grad.clone()
    copied = pickle.loads(pickle.dumps(model))
    loss_of(copied.requires_grad_(False)(x), target).backward()
    torch.autograd.grad(loss_of(model(x), target), x)
    model.requires_grad_(False)
    loss_of(model(x), target).backward()
    model.requires_grad_(True)
    assert torch.equal(model.stem[0].weight.grad, update)
    handle.remove()
    assert not model._forward_hooks


@scenario
def uneven_last_batch(rank: int, world: int) -> None:
    """Ranks with 13 and 11, or 11, 8 and 5 images: a loss summed over images weights them right."""
    sizes = {2: (13, 11), 3: (11, 8, 5)}[world]
    assert_close(train(rank, world, sizes=sizes), alone("conv"))


@scenario
def gradient_clipping(rank: int, world: int) -> None:
    """Of G, before the merge, as in one process with synchronize."""
    given = train(rank, world, micro=2, clip=0.05, steps=FEW)
    assert_close(given, alone("conv", clip=0.05, steps=FEW))


@scenario
def activation_checkpointing(rank: int, world: int) -> None:
    model = make("conv")
    model.checkpointed = True
    given = train(rank, world, micro=2, no_sync=True, model=model, steps=FEW)
    assert_close(given, alone("conv", steps=FEW))


@scenario
def grad_scaler(rank: int, world: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    assert_close(train(rank, world, micro=2, scaler=scaler), alone("conv"))


@scenario
def overflow_on_one_rank(rank: int, world: int) -> None:
    """Every rank skips the step, and none waits for another; what was held is gone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = make("conv")
    before = [p.detach().clone() for p in model.parameters()]
    wrapped, optimizer = DDP(model), sgd(model)
    handle = ghl.synchronize(wrapped, optimizer)
    x, _ = batch("conv", 7)
    loss = wrapped(x).sum() * (float("inf") if rank == 1 else 1.0)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_close(list(model.parameters()), before, 1e-300)
    optimizer.zero_grad()
    handle.remove()
    assert_close(train(rank, world, model=model, scaler=scaler), alone("conv"))


@scenario
def numbers_of_float32(rank: int, world: int) -> None:
    """One step: G, and H0 as -H0 of gate `hebb`, to rounding; no sign takes part."""
    rule = ghl.Rule(gate="hebb", decay="none", normalize="none")
    whole, exact = make("conv", "bp", torch.float32), make("conv", rule)
    x, target = batch("conv", 0)
    with mock.patch.object(torch.distributed, "is_initialized", lambda: False):
        loss_of(exact(x), target).backward()
    loss_of(whole(x.float()), target).backward()
    model = make("conv", rule, torch.float32)
    wrapped = DDP(model)
    handle = ghl.synchronize(wrapped, sgd(model))
    x, target = parts(rank, world, x.float(), target, [BATCH // world] * world)
    for number, (piece, wanted) in enumerate(zip(x.chunk(4), target.chunk(4), strict=True)):
        with wrapped.no_sync() if number < 3 else contextlib.nullcontext():
            loss_of(wrapped(piece), wanted, world).backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert_close([p.grad], [q.grad], 2e-6 * q.grad.abs().max().item())
    handle.merge()
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert_close([p.grad], [q.grad], 2e-6 * q.grad.abs().max().item())


@scenario
def compiled(rank: int, world: int) -> None:
    """The wrapped model, traced; with accumulation."""
    name = {2: "transformer", 3: "conv"}[world]  # compiling is most of a test's time
    given = train(rank, world, name, micro=2, no_sync=True, backend="aot_eager")
    assert_close(given, alone(name))


@scenario
def mean_and_hebb(rank: int, world: int) -> None:
    """M of `mean` is the number of rows of all ranks; −H needs no gradient."""
    for rule in (ghl.Rule(normalize="mean"), ghl.Rule(gate="hebb"), ghl.Rule(gate="sign_only")):
        given = train(rank, world, micro=2, model=make("conv", rule), steps=FEW)
        assert_close(given, alone("conv", rule, steps=FEW))


@scenario
def halved_bytes(rank: int, world: int) -> None:
    """bf16 on the wire: the same bits on all ranks, H0 off by a rounding but not by nothing."""
    model = make("conv", ghl.Rule(gate="hebb", decay="none", normalize="none"))
    wrapped, optimizer = DDP(model), sgd(model)
    updates = []
    for wire in (None, torch.bfloat16):
        handle = ghl.synchronize(wrapped, optimizer, communicate=wire)
        x, target = parts(rank, world, *batch("conv", 0), [BATCH // world] * world)
        optimizer.zero_grad()
        loss_of(wrapped(x), target).backward()
        handle.merge()
        handle.remove()
        updates.append(model.first[0].weight.grad)
    assert_equal_on_all_ranks(updates)
    error = (updates[1] - updates[0]).abs().max() / updates[0].abs().max()
    assert 0 < error < world * 2**-8, f"relative error {error}"


@scenario
def micro_batches_without_a_gradient(rank: int, world: int) -> None:
    """Averaged zeros are not gradients that were zeroed: H0 of those images is kept; also where
    gradients are views of a bucket, which have one version together."""
    share = BATCH // world
    for rule, view in (("ghl", False), ("ghl", True), ("hebb", True))[: 5 - world]:
        model, whole = make("conv", rule), make("conv", rule)
        wrapped, optimizer = DDP(model, gradient_as_bucket_view=view), sgd(model)
        ghl.synchronize(wrapped, optimizer)
        x, target = batch("conv", 0)
        target[torch.arange(BATCH) % share < share // 4 * 3] = -100  # which counts for nothing
        with mock.patch.object(torch.distributed, "is_initialized", lambda: False):
            loss_of(whole(x), target).backward()
        own = parts(rank, world, x, target, [share] * world)
        loss_of(wrapped(own[0]), own[1], world).backward()
        optimizer.zero_grad(set_to_none=False)  # gradients are views from here on
        for piece, wanted in zip(*(t.chunk(4) for t in own), strict=True):
            loss_of(wrapped(piece), wanted, world).backward()
        optimizer.step()
        assert_close([p.grad for p in model.parameters()], [p.grad for p in whole.parameters()])


@scenario
def layers_that_one_rank_alone_uses(rank: int, world: int) -> None:
    """With gradients that are zeroed in place: DDP writes into what were updates."""
    for view in (True, False):
        model, whole = OneBranch(), OneBranch()
        options = {"find_unused_parameters": True, "gradient_as_bucket_view": view}
        wrapped, optimizer = DDP(model, **options), sgd(model)
        ghl.synchronize(wrapped, optimizer)
        of_whole = sgd(whole)
        for step in range(3):
            x, target = batch("branches", step)
            ranks_of = torch.arange(BATCH) // (BATCH // world)
            x += torch.where((ranks_of == 0) | (step == 0), 1.0, -1.0).view(-1, 1, 1, 1)
            with mock.patch.object(torch.distributed, "is_initialized", lambda: False):
                of_whole.zero_grad()
                loss_of(whole(x), target).backward()
                of_whole.step()
            own = parts(rank, world, x, target, [BATCH // world] * world)
            optimizer.zero_grad(set_to_none=False)
            loss_of(wrapped(own[0]), own[1], world).backward()
            optimizer.step()
            assert_close(list(model.parameters()), list(whole.parameters()))
