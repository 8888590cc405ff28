"""Optimizers that others have put something around: the one inside is synchronized."""

from types import SimpleNamespace

import pytest
import timm.optim
from torch import nn
from torch.optim import SGD, Optimizer

import ghl

from .nets import backward, batch, grads, loss_of, make
from .world import assert_close


class Prepared(Optimizer):
    """As accelerate's: a subclass that does not make what Optimizer makes."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)


class Averaging(Prepared):
    """As PostLocalSGDOptimizer, which names it otherwise."""

    def __init__(self, optim):
        self.optim = optim

    def step(self, closure=None):
        self.optim.step(closure)


class Sharing(Optimizer):
    """As Fabric's: with what the one inside has, its hooks too."""

    def __init__(self, optimizer):
        self.__dict__.update(vars(optimizer))
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)


@pytest.mark.parametrize("around", [Prepared, Averaging, Sharing, lambda o: Sharing(Prepared(o))])
def test_updates_are_those_of_the_optimizer_inside(around):
    found = []
    for wrap in (around, lambda optimizer: optimizer):
        model = make("conv")
        optimizer = wrap(SGD(model.parameters(), 0.02))
        ghl.synchronize(model, optimizer)
        for step in range(2):
            model.zero_grad()
            backward(model, "conv", step)
            optimizer.step()
        found.append(grads(model))
    assert_close(*found)


def test_an_optimizer_that_has_yet_to_see_its_first_zero_grad():
    """timm's Lookahead calls no __init__ of Optimizer's, which makes steps call hooks."""
    model = make("conv")
    optimizer = timm.optim.Lookahead(SGD(model.parameters(), 0.02))
    ghl.synchronize(model, optimizer)
    backward(model, "conv", 0)
    optimizer.step()
    reference = make("conv")
    ghl.synchronize(reference, inner := SGD(reference.parameters(), 0.02))
    backward(reference, "conv", 0)
    inner.step()
    assert_close(grads(model), grads(reference))


class Own(SGD):
    """Whose step is its own, though it holds another, as ZeroRedundancyOptimizer does."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.optim = SGD(self.param_groups[0]["params"], lr)


class Sharpness(Optimizer):
    """As implementations of SAM: an optimizer by itself, whose step calls another's."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {})
        self.optimizer = SGD(self.param_groups, lr)

    def step(self, closure=None):
        self.optimizer.step()


@pytest.mark.parametrize("kind", [Own, Sharpness])
def test_one_that_steps_itself_is_not_looked_into(kind):
    model = make("conv")
    optimizer = kind(model.parameters(), 0.02)
    ghl.synchronize(model, optimizer)
    backward(model, "conv", 0)
    optimizer.step()
    assert model.first[0].weight.grad.abs().max() == 1


@pytest.mark.parametrize(
    "wrong", [None, SimpleNamespace(optimizer=None), Prepared(None), nn.Linear]
)
def test_what_is_no_optimizer_is_refused_before_anything_changes(wrong):
    model = make("conv")
    with pytest.raises(TypeError, match=r"optimizer is a .*, must be a torch.optim.Optimizer"):
        ghl.synchronize(model, wrong)
    x, target = batch("conv", 0)
    loss_of(model(x), target).backward()
    assert model.first[0].weight.grad.abs().max() == 1
