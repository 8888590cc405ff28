"""What is done to a model, its gradients or its optimizers between a backward and the step."""

import copy

import pytest
import torch

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
        halves(model, lambda: change(model) if when == "between" else None)
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
