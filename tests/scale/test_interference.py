"""What is done to a model, its gradients or its optimizers between a backward and the step."""

import copy
import functools
import gc

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ghl
from ghl import held

from .nets import BOTH, backward, batch, loss_of, make, sgd, synchronized
from .world import assert_close


def halves(model, between):
    """Two backwards of one batch, and what is done between them."""
    x, target = batch("conv", 0)
    loss_of(model(x[:9]), target[:9]).backward()
    between()
    loss_of(model(x[9:]), target[9:]).backward()


def expected():
    model = make("conv")
    backward(model, "conv", 0, micro=1)
    return [p.grad for p in model.parameters()]


def grads(model):
    return [p.grad for p in model.parameters()]


NOTHING = {
    "to": lambda model: model.to("cpu"),
    "load": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "share": lambda model: model.share_memory(),
    "double": lambda model: model.double(),
    "rule": lambda model: setattr(model.first[0], "rule", "ghl"),
    "swap": lambda model: ghl.swap(model, types=BOTH),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_no_layer_keeps_what_is_held(name):
    model, optimizer, _ = synchronized()
    halves(model, lambda: NOTHING[name](model))
    optimizer.step()
    assert_close(grads(model), expected())


def to_channels_last(model):
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.to(memory_format=torch.channels_last)


CHANGES = {
    "converted": (lambda model: model.float().double(), "moved, converted, given another rule"),
    "another rule": (lambda model: ghl.swap(model, "hebb", types=BOTH), "given another rule"),
    "bp and back": (
        lambda model: [setattr(model.first[0], "rule", rule) for rule in ("bp", "ghl")],
        "given another rule",
    ),
    "reordered": (to_channels_last, "another memory format"),
}


@pytest.mark.parametrize("when", ["between", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_change_within_an_accumulation_is_an_error(name, when):
    """Until zero_grad(), also after one that was caught."""
    change, message = CHANGES[name]
    for none in (True, False):
        model, optimizer, _ = synchronized()
        halves(model, functools.partial(change, model) if when == "between" else lambda: None)
        if when == "after":
            change(model)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                optimizer.step()
        optimizer.zero_grad(set_to_none=none)
        backward(model, "conv", 0)
        optimizer.step()


def test_synchronized_with_an_ordinary_gradient_is_an_error():
    model = make("conv", "bp")
    optimizer = sgd(model)
    backward(model, "conv", 0)
    ghl.swap(model, types=BOTH)
    ghl.synchronize(model, optimizer)
    backward(model, "conv", 0)
    with pytest.raises(RuntimeError, match="synchronized within an accumulation"):
        optimizer.step()


@pytest.mark.parametrize("first", [True, False])
def test_backward_with_inputs_is_an_error(first):
    """Its H0 is missing, though other micro-batches have one; autograd.grad leaves nothing."""
    model, optimizer, _ = synchronized()
    x, target = batch("conv", 0)
    for number in range(2):
        inputs = list(model.parameters()) if first == (number == 0) else None
        loss_of(model(x), target).backward(inputs=inputs)
    with pytest.raises(RuntimeError, match="without inputs="):
        optimizer.step()
    optimizer.zero_grad()
    halves(model, lambda: torch.autograd.grad(model(x).sum(), list(model.parameters())))
    optimizer.step()
    assert_close(grads(model), expected())


def test_backward_in_a_graph_and_step_outside_is_an_error(monkeypatch):
    model, optimizer, _ = synchronized()
    monkeypatch.setattr(held, "capturing", lambda: True)
    backward(model, "conv", 0)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, "conv", 0)
    monkeypatch.setattr(held, "capturing", lambda: False)
    with pytest.raises(RuntimeError, match=r"capture optimizer.step\(\) in the same graph"):
        optimizer.step()


@pytest.mark.parametrize("none", [True, False])
def test_remove_while_gradients_await_a_step_is_an_error(none):
    model, optimizer, handle = synchronized()
    backward(model, "conv", 0)
    with pytest.raises(RuntimeError, match=r"before remove\(\)"):
        handle.remove()
    optimizer.step()
    assert_close(grads(model), expected())
    handle.remove()
    _, _, handle = model, optimizer, ghl.synchronize(model, optimizer)
    optimizer.zero_grad()
    backward(model, "conv", 0)
    optimizer.zero_grad(set_to_none=none)
    handle.remove()


def new_zeros(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def test_gradient_replaced_by_zeros_drops_what_is_held():
    model, optimizer, _ = synchronized()
    backward(model, "conv", 7)
    new_zeros(model)
    backward(model, "conv", 0)
    optimizer.step()
    assert_close(grads(model), expected())


def test_copy_of_an_update_is_not_added_to():
    """Without synchronize; zeros may be, and autograd.grad adds nothing."""
    model = make("conv")
    backward(model, "conv", 0, micro=1)
    for p in model.parameters():
        p.grad = p.grad.clone()
    torch.autograd.grad(model(batch("conv", 0)[0]).sum(), list(model.parameters()))
    with pytest.raises(RuntimeError, match="already held a copy of an update"):
        backward(model, "conv", 0, micro=1)
    new_zeros(model)
    backward(model, "conv", 0, micro=1)
    assert_close(grads(model), expected())


def test_step_of_another_optimizer_is_an_error():
    """While gradients are held; with none, the other may be synchronized instead."""
    model, optimizer, _ = synchronized()
    other = sgd(model)
    backward(model, "conv", 0)
    with pytest.raises(RuntimeError, match="about to step with an ordinary gradient"):
        other.step()
    with pytest.raises(RuntimeError, match="is synchronized already"):
        ghl.synchronize(model, other)
    optimizer.step()
    other.step()
    optimizer.zero_grad()
    ghl.synchronize(model, other)
    model.load_state_dict(make("conv").state_dict())
    backward(model, "conv", 0)
    with pytest.raises(RuntimeError, match="about to step with an ordinary gradient"):
        optimizer.step()
    other.step()
    assert_close(grads(model), expected())


def test_forgotten_zero_grad_is_told_without_reading(monkeypatch):
    """A GPU would be waited for."""
    model, optimizer, _ = synchronized()
    backward(model, "conv", 0)
    optimizer.step()
    monkeypatch.setattr(torch.Tensor, "any", None)
    with pytest.raises(RuntimeError, match="still holds the update"):
        backward(model, "conv", 0)


def test_an_optimizer_steps_on_when_the_last_synchronizer_is_gone():
    """The hook that watched it is called once more, among others."""
    layer = ghl.Linear(3, 4)
    ghl.synchronize(layer, sgd(layer))
    another = register_optimizer_step_pre_hook(lambda *arguments: None)
    del layer
    gc.collect()
    other = nn.Linear(3, 4)
    optimizer = sgd(other)
    for _ in range(2):
        other(torch.rand(5, 3)).sum().backward()
        optimizer.step()
    another.remove()
