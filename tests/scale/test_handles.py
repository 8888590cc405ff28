"""Which weights a handle of ghl.synchronize has: frozen ones, others', those that came later."""

import contextlib
import types

import pytest
import torch
from torch import nn

import ghl
from ghl import ranks
from ghl.deferred import refusals

from .nets import backward, batch, grads, loss_of, make, sgd
from .world import assert_close


def test_a_weight_that_is_thawed_later_waits_for_the_step_as_others_do():
    """Clipping would take an update that backward made for a gradient, the largest of all."""

    def clipped(frozen):
        model = make("conv")
        model.first.requires_grad_(not frozen)
        optimizer = sgd(model)
        ghl.synchronize(model, optimizer)
        model.first.requires_grad_(True)
        backward(model, "conv", 0)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        return [norm, *grads(model)]

    assert_close(clipped(True), clipped(False))


def test_a_frozen_trunk_of_two_models_is_the_first_ones():
    trunk = ghl.Linear(4, 4).requires_grad_(False)
    models = [nn.Sequential(trunk, ghl.Linear(4, 3)) for _ in range(2)]
    optimizers = [sgd(model) for model in models]
    handles = [
        ghl.synchronize(model, optimizer)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        assert model[1].weight.grad.abs().max() == 1
    assert [len(handle._weights) for handle in handles] == [2, 1]


def test_a_new_optimizer_without_the_frozen_weights_replaces_the_former():
    model = make("conv")
    model.first.requires_grad_(False)
    former = ghl.synchronize(model, sgd(model))
    live = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(live, 0.02)
    ghl.synchronize(model, optimizer)
    assert not former._weights
    backward(model, "conv", 0)
    optimizer.step()
    assert model.second[0].weight.grad.abs().max() == 1


def test_arguments_are_named_that_are_not_what_they_must_be():
    model = make("conv")
    optimizer = sgd(model)
    for arguments, message in (
        ((optimizer, model), "model is SGD, must be an nn.Module"),
        (([model], optimizer), "model is list, must be an nn.Module"),
        ((model, model), "optimizer is a ConvNet, must be a torch.optim.Optimizer"),
        ((model, optimizer, 3), "group is 3, must be a torch.distributed.ProcessGroup or None"),
    ):
        with pytest.raises(TypeError, match=message):
            ghl.synchronize(*arguments)


def test_other_models_of_the_optimizer_may_have_their_updates_in_backward():
    models = make("conv"), make("conv")
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], 0.02)
    ghl.synchronize(models[0], optimizer)
    for model in models:
        backward(model, "conv", 0, micro=1)
    optimizer.step()
    assert_close(grads(models[0]), grads(models[1]))


def add_layer(model, optimizer):
    model.more = ghl.Linear(5, 5, dtype=torch.float64)
    optimizer.add_param_group({"params": list(model.more.parameters())})


def give_a_rule(model, optimizer):
    model.more.rule = "ghl"


@pytest.mark.parametrize("change", [add_layer, give_a_rule])
def test_an_update_made_in_backward_in_spite_of_synchronize_is_an_error(change):
    model = make("conv")
    if change is give_a_rule:
        model.more = ghl.Linear(5, 5, dtype=torch.float64, rule="bp")
    optimizer = sgd(model)
    handle = ghl.synchronize(model, optimizer)
    change(model, optimizer)
    x, target = batch("conv", 0)

    def step():
        optimizer.zero_grad()
        loss_of(model.more(model(x)), target).backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match=r"update of \(5, 5\) was made in backward.*remove\(\)"):
        step()
    optimizer.zero_grad()
    handle.remove()
    ghl.synchronize(model, optimizer)
    step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_of_ranks_are_compared_in_whatever_order_they_are_added(dtype):
    """Ranks may have other threads: a sum of floats would differ, and a right step be refused."""
    grad = torch.randn(64, 32, 3, 3).mul(10.0 ** -torch.arange(3.0)).to(dtype)
    same = grad.flatten().flip(0), grad.to(memory_format=torch.channels_last), grad.mT
    assert {refusals.bits(t) for t in same} == {refusals.bits(grad)}
    grad[0, 0, 0, 0] = torch.nextafter(grad[0, 0, 0, 0], torch.ones((), dtype=dtype) * 9)
    assert refusals.bits(grad) != refusals.bits(same[0])


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_ranks_tell_each_other_from_the_device_of_their_weights(monkeypatch, kind):
    """Whoever has not called torch.cuda.set_device is on every rank's first GPU."""
    asked = []

    def gather(gathered, value, group):
        gathered[:] = [value] * 2

    monkeypatch.setattr(ranks, "size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: asked.append(device) or contextlib.nullcontext()
    )
    weight = types.SimpleNamespace(device=torch.device(kind, 1), is_cuda=kind == "cuda")
    assert ranks.gather("this", None, [weight]) == ["this", "this"]
    assert asked == [weight.device] * weight.is_cuda
