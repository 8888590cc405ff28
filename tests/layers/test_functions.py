"""Layers among autograd.Functions of others, and what a backward that raised leaves behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghl


class Stop(torch.autograd.Function):
    """Has no gradient for its input."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@pytest.mark.parametrize("rule", ["ghl", "hebb", "sign"])
def test_without_a_gradient_there_is_no_update(rule):
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    ghl.swap(model, rule, types=(nn.Conv2d, nn.Linear))
    features = Stop.apply(model[:2](torch.randn(5, 2, 2, 2)))
    model[3](Stop.apply(model[2](features))).sum().backward()
    assert [model[i].weight.grad is None for i in (0, 2, 3)] == [True, True, False]
    assert model[0].bias.grad is None


class Reversible(torch.autograd.Function):
    """RevNet's block, whose backward has backwards of its parts, and no gradients for the
    parameters that it is given."""

    @staticmethod
    def forward(ctx, f, g, x1, x2, *parameters):
        y1 = x1 + f(x2)
        y2 = x2 + g(y1)
        ctx.parts = f, g
        ctx.save_for_backward(y1, y2)
        return y1, y2

    @staticmethod
    def backward(ctx, d1, d2):
        (f, g), (y1, y2) = ctx.parts, ctx.saved_tensors
        with torch.enable_grad():
            y1 = y1.detach().requires_grad_()
            moved = g(y1)
            torch.autograd.backward(moved, d2)
            d1 = d1 + y1.grad
            x2 = (y2 - moved).detach().requires_grad_()
            torch.autograd.backward(f(x2), d1)
        return None, None, d1, d2 + x2.grad, *[None] * (len(ctx.needs_input_grad) - 4)


@pytest.mark.parametrize("held", [False, True])
def test_reversible_blocks_that_are_given_their_parameters(held):
    torch.manual_seed(0)
    parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
    ghl.swap(parts, "hebb", types=nn.Linear)
    f, g = parts
    a, b = torch.randn(2, 5, 4, dtype=torch.float64)
    y1 = a + f(b)
    (y1 * (b + g(y1))).sum().backward()
    expected = [p.grad for p in parts.parameters()]
    parts.zero_grad()
    optimizer = torch.optim.SGD(parts.parameters(), 0.0)
    if held:
        ghl.synchronize(parts, optimizer)
    for scale in (10.0, 1.0):  # what the first has left is dropped
        optimizer.zero_grad()
        y1, y2 = Reversible.apply(f, g, scale * a, scale * b, *parts.parameters())
        (y1 * y2).sum().backward()
    optimizer.step()
    torch.testing.assert_close([p.grad for p in parts.parameters()], expected)


BAD = {
    "a weight without its layer": lambda m, x: F.linear(x, m[0].weight).sum().backward(),
    "the weights alone": lambda m, x: m(x).sum().backward(inputs=[m[0].weight, m[2].weight]),
    "a transform": lambda m, x: torch.vmap(m)(x).square().sum().backward(),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_a_backward_that_raised_has_left_is_not_added_to(bad):
    """As where a notebook's cell is run again."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(7, 4)
    ghl.swap(model, types=nn.Linear)
    fresh = copy.deepcopy(model)
    with pytest.raises(RuntimeError):
        BAD[bad](model, x)
    if any(p.grad is not None for p in model.parameters() if p.dim() == 2):
        with pytest.raises(RuntimeError, match=r"of a failed backward, when.*zero_grad"):
            model(x).square().sum().backward()
    for net in (model, fresh):
        net.zero_grad()
        net(x).square().sum().backward()
    for ours, wanted in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours.grad, wanted.grad)


class Beside(torch.autograd.Function):
    """Is given a weight, and has no gradient for it."""

    @staticmethod
    def forward(ctx, x, weight):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


def test_no_gradient_is_added_to_no_update():
    layer, x = ghl.Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    ghl.synchronize(layer, optimizer)
    layer(x).square().sum().backward()
    optimizer.step()
    update = layer.weight.grad.clone()
    Beside.apply(x, layer.weight).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight.grad, update)


def test_no_gradient_hides_no_gradient_that_was_zeroed():
    """H0 of before must go with it."""
    layer, x = ghl.Linear(4, 3, rule="hebb"), torch.randn(5, 4, requires_grad=True)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    ghl.synchronize(layer, optimizer)
    updates = []
    for scale in (None, 10.0):
        if scale is not None:
            layer(scale * x).square().sum().backward()
            optimizer.zero_grad(set_to_none=False)
            Beside.apply(x, layer.weight).sum().backward()
        layer(x).square().sum().backward()
        optimizer.step()
        updates.append(layer.weight.grad)
        optimizer.zero_grad()
    assert torch.equal(*updates)


def test_autograd_grad_is_no_addition():
    """Hooks of a weight run for it as well; the next backward that brings none is still none."""
    layer, x = ghl.Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    layer(x).square().sum().backward()
    update = layer.weight.grad.clone()
    torch.autograd.grad(layer(x).sum(), layer.weight)
    Beside.apply(x, layer.weight).sum().backward()
    assert torch.equal(layer.weight.grad, update)
