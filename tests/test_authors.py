"""Against the published formulation, as `ghl.bench.formulas` writes it: the same rule."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghl
from bench import cases
from ghl.bench import formulas
from ghl.bench.layers import Layer
from ghl.recipes.hebbnets import DeepHebb
from ghl_kernels import Rule, reference

TAUS = {"conv1": 1.0, "conv2": 1 / 0.65, "conv3": 4.0}


class AuthorsConv2d(nn.Conv2d):
    """A layer that trains as the published one: H in the forward, combined after backward."""

    tau = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            with torch.no_grad():
                H = formulas.authors_hebbian(x, y, self.weight, self.padding[0], self.tau)
                self.hebbian = H / (H.abs().amax() + 1e-30)
        return y

    def update_gradient(self) -> None:
        """To be called between backward and the optimizer's step."""
        with torch.no_grad():
            self.weight.grad.copy_(self.hebbian.abs() * self.weight.grad.sign())


@pytest.fixture(params=cases.DEEPHEBB)
def layer(request: pytest.FixtureRequest) -> Layer:
    return dataclasses.replace(cases.DEEPHEBB[request.param], batch=2)


def test_reference_is_the_published_rule(layer: Layer) -> None:
    """In float64 both formulations agree to rounding, signs included."""
    x, y, g, w = (t.double() for t in cases.tensors(layer))
    y = F.conv2d(x, w, padding=layer.padding)
    published = formulas.authors(x, y, g, w, layer.padding, layer.tau)
    ours = reference.conv2d_update(x, y, g, w, Rule(tau=layer.tau), padding=layer.padding).update
    torch.testing.assert_close(ours, published, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ghl", "ghl.composed", "natural", "trick"])
def test_every_implementation_gives_the_published_update(layer: Layer, name: str) -> None:
    """In float32: magnitudes everywhere, signs where rounding cannot have decided them."""
    tensors = cases.tensors(layer)
    exact = formulas.authors(*(t.double() for t in tensors), layer.padding, layer.tau)
    G = formulas.weight_gradient(*(tensors[i].double() for i in (0, 2, 3)), layer.padding)
    update = cases.update(layer, name, tensors)()
    torch.testing.assert_close(update.abs().double(), exact.abs(), rtol=1e-3, atol=1e-5)
    certain = (G.abs() > 1e-4 * G.abs().amax()) & (exact.abs() > 1e-5)
    assert torch.equal(update.sign()[certain], exact.sign()[certain].float())


def published_network(network: DeepHebb) -> list[AuthorsConv2d]:
    """Give the convolutions of `network` the published layer's forward and backward."""
    layers = []
    for name, tau in TAUS.items():
        layer = getattr(network, name)
        assert type(layer) is nn.Conv2d
        layer.__class__ = AuthorsConv2d
        layer.tau = tau
        layers.append(layer)
    return layers


def test_one_training_step() -> None:
    """The same weights after a step of DeepHebb with the published optimizer, in float64."""

    def network() -> DeepHebb:
        torch.manual_seed(0)
        return DeepHebb(channels=3, classes=10, size=16, width=0.25).double()

    def step(model: nn.Module, published: list[AuthorsConv2d]) -> None:
        groups = [
            {"params": [getattr(model, name).weight for name in TAUS], "weight_decay": 5e-2},
            {"params": model.classifier.parameters(), "lr": 5e-3},
        ]
        optimizer = torch.optim.SGD(groups, lr=1e-2)
        torch.manual_seed(1)
        images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
        F.cross_entropy(model(images), torch.arange(8)).backward()
        for layer in published:
            layer.update_gradient()
        optimizer.step()

    theirs, ours = network(), network()
    step(theirs, published_network(theirs))
    ghl.swap(ours, tau=TAUS)
    before = network().state_dict()
    step(ours, [])
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert all(
        not torch.equal(ours.state_dict()[f"{n}.weight"], before[f"{n}.weight"]) for n in TAUS
    )
