"""Layers inside autograd: ordinary gradients, higher orders, checkpoints, offloading."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import ghl

from .oracle import assert_like_reference

D = torch.float64
CASES = {
    "linear": (lambda m, **o: m.Linear(4, 3, dtype=D, **o), (5, 4)),
    "linear 3-D": (lambda m, **o: m.Linear(4, 3, dtype=D, **o), (2, 3, 4)),
    "conv": (lambda m, **o: m.Conv2d(4, 6, 3, 2, 1, groups=2, dtype=D, **o), (2, 4, 5, 5)),
    "conv same": (lambda m, **o: m.Conv2d(2, 3, 2, padding="same", dtype=D, **o), (2, 2, 4, 4)),
}


def pair(case, rule="ghl"):
    """A plain layer, its ghl counterpart with the same numbers, and an input."""
    torch.manual_seed(0)
    make, shape = CASES[case]
    plain, layer = make(nn), make(ghl, rule=rule)
    layer.load_state_dict(plain.state_dict())
    return plain, layer, torch.randn(shape, dtype=D, requires_grad=True)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_of_input_and_bias(case):
    """Both are ordinary under ghl, to second order."""
    _, layer, x = pair(case)
    layer.weight.requires_grad_(True)

    def run(x, bias):
        return torch.func.functional_call(layer, {"bias": bias, "weight": layer.weight}, (x,))

    inputs = (x, layer.bias)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_of_weight_under_bp(case):
    """The preset bp is the plain layer."""
    _, layer, x = pair(case, "bp")

    def run(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert gradcheck(run, (layer.weight,))


@pytest.mark.parametrize("case", CASES)
def test_autograd_grad_is_the_ordinary_gradient(case):
    """Only accumulation into weight.grad makes an update; autograd.grad does not."""
    plain, layer, x = pair(case)
    for model in (plain, layer):
        model(x.tanh()).square().sum().backward()
    update = layer.weight.grad
    given = torch.autograd.grad(layer(x.tanh()).square().sum(), layer.weight)
    torch.testing.assert_close(given[0], plain.weight.grad)
    assert layer.weight.grad is update


@pytest.mark.parametrize("case", CASES)
def test_gradient_penalty_on_the_input(case):
    """‖∂L/∂x‖² through create_graph: bias and the sign of the weight's gradient as plain nn."""
    plain, layer, x = pair(case)
    for model in (plain, layer):
        loss = model(x).tanh().sum()
        (grad_x,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + grad_x.square().sum()).backward()
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    certain = plain.weight.grad.abs() > 1e-9
    assert torch.equal(layer.weight.grad.sign()[certain], plain.weight.grad.sign()[certain])
    assert layer.weight.grad.abs().max() == 1


@pytest.mark.parametrize("case", CASES)
def test_gradient_penalty_on_the_weight(case):
    """autograd.grad of the weight can itself be differentiated, as in plain nn."""
    second = []
    for model in pair(case)[:2]:
        x = pair(case)[2]
        (G,) = torch.autograd.grad(model(x).tanh().sum(), model.weight, create_graph=True)
        second.append(torch.autograd.grad(G.square().sum(), (x, model.weight, model.bias)))
    for expected, given in zip(*second, strict=True):
        torch.testing.assert_close(given, expected)


def test_create_graph_does_not_change_the_update():
    """backward(create_graph=True) leaves the same update."""
    _, layer, x = pair("conv")
    updates = []
    for options in ({}, {"create_graph": True}):
        layer.weight.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns once in a process of create_graph
            layer(x).square().sum().backward(**options)
        updates.append(layer.weight.grad.detach())
    torch.testing.assert_close(*updates)


def two_layers():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, dtype=D), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3, dtype=D)
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    """The forward that backward runs again feeds the sums, once."""
    x = torch.randn(3, 2, 6, 6, dtype=D, requires_grad=True)

    def run(model):
        first, *rest = model
        y = checkpoint(nn.Sequential(first, rest[0]), x, use_reentrant=use_reentrant)
        return checkpoint(nn.Sequential(*rest[1:]), y, use_reentrant=use_reentrant).square().sum()

    model = assert_like_reference(two_layers(), lambda m: m(x).square().sum())
    updates = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    run(model).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, updates[name])


def test_reentrant_checkpoint_of_a_shared_layer_is_an_error():
    """It runs one backward per use, whose updates cannot be added."""
    torch.manual_seed(2)
    layer, x = ghl.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    y = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="already held an update"):
        y.sum().backward()


def test_saved_tensors_offloaded():
    """save_on_cpu packs and unpacks what backward needs, whatever is in place."""

    def run(model):
        with torch.autograd.graph.save_on_cpu():
            return model(x).square().sum()

    torch.manual_seed(3)
    x = torch.randn(3, 2, 6, 6, dtype=D)
    assert_like_reference(two_layers(), run)


def test_module_and_tensor_hooks_run():
    """Hooks of users see what they would see with torch.nn."""
    seen = {}
    for kind, model in (("plain", two_layers()), ("ghl", two_layers())):
        if kind == "ghl":
            ghl.swap(model, types=(nn.Conv2d, nn.Linear))
        model[1].inplace = False
        for i in (0, 3):
            model[i].register_full_backward_hook(
                lambda m, gi, go, key=(kind, i): seen.__setitem__(key, (gi[0], go[0]))
            )
        x = torch.ones(3, 2, 6, 6, dtype=D, requires_grad=True)
        model(x).square().sum().backward()
    for i in (0, 3):
        torch.testing.assert_close(seen["ghl", i], seen["plain", i])


def test_anomaly_mode():
    """detect_anomaly finds nothing to complain about."""
    _, layer, x = pair("conv")
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        layer(x).square().sum().backward()
    assert layer.weight.grad.abs().max() == 1


def test_copies_train_apart():
    """Two copies on one graph: each weight merges its own sums."""
    torch.manual_seed(4)
    a = ghl.Linear(4, 4, dtype=D)
    b, x = copy.deepcopy(a), torch.randn(3, 4, dtype=D)
    b(a(x)).square().sum().backward()
    assert a.weight.grad.abs().max() == 1
    assert b.weight.grad.abs().max() == 1
    assert not torch.equal(a.weight.grad, b.weight.grad)
