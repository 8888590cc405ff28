"""Students under a regulariser, against networks of PyTorch's own modules trained alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ghl.recipes.reproduce import regularisation, sre
from ghl.recipes.reproduce.regularisers import REGULARISERS, Regularised
from ghl.recipes.reproduce.students import Stack, alignment, squared_error
from tests.recipes.students import single

LINEAR = (0, 2, 4)
STRENGTHS = (0.0, 0.05)


def alone(stack, index, kind):
    """Network `index` of a stack as PyTorch builds it under `kind`."""
    model = single(stack, index)
    for place in LINEAR:
        if kind == "weight-norm":
            parametrizations.weight_norm(model[place])
    if kind == "batch-norm":
        for place in LINEAR[:-1]:
            model[place + 1] = nn.Sequential(
                nn.BatchNorm1d(model[place].out_features, affine=False), nn.Tanh()
            )
    return model


def penalty(model, x, kind, strength):
    weights = [model[place].weight for place in LINEAR]
    if kind == "l1":
        return strength * sum(w.abs().sum() for w in weights)
    if kind == "spectral":
        return strength / 2 * sum(torch.linalg.matrix_norm(w, 2) ** 2 for w in weights)
    if kind == "activity":
        return strength * sum(model[: place + 2](x).abs().sum(1).mean() for place in LINEAR[:-1])
    return 0.0


@pytest.fixture
def students():
    """A stack of two networks and data for five steps, in float64."""
    torch.set_default_dtype(torch.float64)
    yield Stack((4, 6, 6, 3), [0, 1], "tanh"), torch.randn(5, 2, 7, 4), torch.randn(5, 2, 7, 3)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["l1", "activity", "spectral", "batch-norm", "weight-norm"])
def test_a_regularised_stack_trains_as_its_networks_do_alone(students, kind):
    stack, x, y = students
    models = [alone(stack, i, kind) for i in range(2)]
    by_decay = REGULARISERS[kind].by_decay
    optimizers = [
        torch.optim.SGD(m.parameters(), 0.1, weight_decay=s if by_decay else 0.0)
        for m, s in zip(models, STRENGTHS, strict=True)
    ]
    learner = Regularised(stack, kind, 0.1, torch.tensor(STRENGTHS), 0)
    for step in range(5):
        if kind == "spectral":
            for _ in range(300):  # until the power iteration has found it
                learner.regulariser.largest()
        _, layers = learner.gradients(x[step], squared_error(y[step]))
        cosines = alignment(stack, layers, 1)
        learner.step()
        for i, model in enumerate(models):
            optimizers[i].zero_grad()
            found, h, weight = observed(model, x[step, i])
            loss = (found - y[step, i]).square().mean()
            (S,) = torch.autograd.grad(-loss, [weight], retain_graph=True)
            B = h[1].T @ h[0]
            assert float(cosines[i]) == pytest.approx(float((S * B).sum() / S.norm() / B.norm()))
            (loss + penalty(model, x[step, i], kind, STRENGTHS[i])).backward()
            optimizers[i].step()
    output = learner.predict(x[0])
    for i, model in enumerate(models):
        torch.testing.assert_close(output[i], model(x[0, i]).detach(), rtol=1e-5, atol=1e-6)


def observed(model, x):
    """Output, (h_a, h_b without bias) of the second layer, and the weight that it used."""
    seen = {}

    def hook(layer, args, y):
        seen["h"] = args[0].detach(), (y - layer.bias).detach()

    handle = model[2].register_forward_hook(hook)
    if hasattr(model[2], "parametrizations"):
        with nn.utils.parametrize.cached():
            y = model(x)
            weight = model[2].weight
    else:
        y, weight = model(x), model[2].weight
    handle.remove()
    return y, seen["h"], weight


def test_spectral_norms_are_one(students):
    stack, *_ = students
    learner = Regularised(stack, "spectral-norm", 0.1, torch.zeros(2), 0)
    for _ in range(300):
        learner.regulariser.largest()
    for w in learner.regulariser.weights():
        torch.testing.assert_close(torch.linalg.matrix_norm(w, 2), torch.ones(2))


def test_the_signal_of_normalised_neurons_is_orthogonal_to_their_weights(students):
    """A batch norm does not see a neuron's length, so no gradient points along its weight."""
    stack, x, y = students
    Regularised(stack, "batch-norm", 0.1, torch.zeros(2), 0).gradients(x[0], squared_error(y[0]))
    w = stack.weights[1]
    along = (w.grad * w).sum(2) / (w.grad.norm(dim=2) * w.norm(dim=2))
    assert along.abs().max() < 1e-3, "of EPSILON"
    plain = copy.copy(stack)
    plain.activation = torch.tanh
    w.grad = None
    squared_error(y[0])(plain.forward(x[0])[0]).sum().backward()
    assert ((w.grad * w).sum(2) / (w.grad.norm(dim=2) * w.norm(dim=2))).abs().max() > 0.05


def test_dropout_silences_its_share_and_keeps_the_mean():
    stack = Stack((4, 2000, 3), [0, 1, 2], "linear")
    strengths = torch.tensor([0.0, 0.2, 0.5])
    regulariser = REGULARISERS["dropout"](stack, strengths, 0)
    dropped = regulariser.activate(torch.ones(3, 20, 2000))
    torch.testing.assert_close(
        (dropped == 0).double().mean((1, 2)).float(), strengths, atol=0.01, rtol=0
    )
    torch.testing.assert_close(dropped.mean((1, 2)), torch.ones(3), atol=0.02, rtol=0)
    regulariser.training = False
    assert regulariser.activate(torch.ones(3, 1, 2)).eq(1).all()


def test_without_strength_a_cell_is_that_of_experiment_2():
    plain = sre.train(sre.Students("sgd", 0.1, steps=40), [0], torch.zeros(1))
    for kind in ("decay", "l1", "activity", "dropout", "spectral"):
        found = regularisation.cell(kind, [0.0], [0], 40)
        assert found["cosine"][0] == pytest.approx(plain["cosine"], abs=1e-4), kind
