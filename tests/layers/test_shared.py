"""One weight used more than once: raw sums are added over all uses and merged once."""

import copy

import pytest
import torch
from torch import nn

import ghl
from ghl_kernels import Rule

from .oracle import assert_like_reference, assert_update, record

D = torch.float64


class Tied(nn.Module):
    """Two Linear layers with one weight, and what depends on the rule to be seen apart."""

    def __init__(self, linear=nn.Linear, **rules):
        super().__init__()
        self.first = linear(5, 5, dtype=D, **rules)
        self.second = linear(5, 5, dtype=D, **rules)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def square(model, *inputs):
    return sum((model(x) - 0.5).square().sum() for x in inputs)


@pytest.mark.parametrize("preset", ["ghl", "hebb", "sign"])
@pytest.mark.parametrize("normalize", ["absmax", "mean", "none"])
def test_module_used_twice(preset, normalize):
    """The merge of summed pairs, M their total, not the sum of merges."""
    torch.manual_seed(0)
    shared = nn.Linear(5, 5, dtype=D)
    plain, x = nn.Sequential(shared, nn.Tanh(), shared), torch.randn(6, 5, dtype=D)
    rule = Rule.preset(preset).replace(normalize=normalize)
    assert_like_reference(plain, lambda m: square(m, x), rule)


@pytest.mark.parametrize("sizes", [(8, 8), (8, 6)])
def test_siamese_convolutions(sizes):
    """model(a), model(b), also with images of different sizes, in one loss."""
    torch.manual_seed(1)
    plain = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, dtype=D), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3, dtype=D)
    )
    inputs = [torch.randn(3, 2, size, size, dtype=D) for size in sizes]
    assert_like_reference(plain, lambda m: square(m, *inputs), Rule(normalize="mean", tau=0.5))


def test_not_the_sum_of_updates():
    """Merging each use first would be another update: the test above can tell."""
    torch.manual_seed(2)
    layer, xs = ghl.Linear(5, 4), torch.randn(2, 6, 5)
    square(layer, *xs).backward()
    together, layer.weight.grad = layer.weight.grad, None
    apart = torch.zeros_like(together)
    for x in xs:
        square(layer, x).backward()
        apart += layer.weight.grad
        layer.weight.grad = None
    assert not torch.allclose(together, apart, atol=0.1)


def test_one_use_without_gradient():
    """A use that the loss does not see adds nothing."""
    torch.manual_seed(3)
    layer, x = ghl.Linear(5, 4), torch.randn(6, 5)
    square(layer, x).backward()
    expected, layer.weight.grad = layer.weight.grad, None
    layer(torch.randn(3, 5))
    with torch.no_grad():
        layer(torch.randn(3, 5))
    square(layer, x).backward()
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("preset", ["ghl", "hebb", "sign"])
def test_tied_weights(preset):
    """Two layers with one Parameter: one merge of the sums of both."""
    torch.manual_seed(4)
    plain, x = Tied(), torch.randn(6, 5, dtype=D)
    run = lambda m: square(m, x)  # noqa: E731
    calls = record(plain, run)
    model = copy.deepcopy(plain)
    assert model.first.weight is model.second.weight
    ghl.swap(model, preset, types=nn.Linear)
    run(model).backward()
    assert_update(model.first.weight, calls["first"] + calls["second"], Rule.preset(preset))


def test_tied_layers_change_their_rule_together():
    """A second swap gives both the new rule; unswap gives both back."""
    torch.manual_seed(5)
    model, x = Tied(), torch.randn(6, 5, dtype=D)
    ghl.swap(model, types=nn.Linear)
    ghl.swap(model, "sign", types=nn.Linear)
    square(model, x).backward()
    assert model.first.weight.grad.abs().eq(1).all()
    assert ghl.unswap(model) == ["first", "second"]
    model.zero_grad()
    square(model, x).backward()
    assert not model.first.weight.grad.abs().eq(1).any()


def test_conflicting_rules_are_an_error():
    """Layers with one weight must agree; swap finds out before anything changes."""
    with pytest.raises(ValueError, match="another layer has the same weight"):
        model = Tied(ghl.Linear)
        model.second.rule = "hebb"
    model = Tied()
    with pytest.raises(ValueError, match=r"'second' would have .* shares its weight with 'first'"):
        ghl.swap(model, tau={"first": 0.5}, types=nn.Linear)
    assert type(model.first) is nn.Linear
    ghl.swap(model, types=nn.Linear)
    with pytest.raises(ValueError, match="shares its weight"):
        ghl.swap(model, "hebb", types=nn.Linear, exclude="second")


@pytest.mark.parametrize("change", ["double", "half"])
def test_tied_layers_moved_together(change):
    """module.to() of a model, or of one of its two layers, keeps the sums shared."""
    torch.manual_seed(6)
    model = Tied(ghl.Linear).float()
    getattr(model.second if change == "double" else model, change)()
    dtype = model.first.weight.dtype
    model.to(dtype)
    square(model, torch.randn(6, 5, dtype=dtype)).backward()
    assert model.first.weight.grad.abs().max() == 1


def test_weight_shared_with_an_embedding():
    """Other users of the weight add to its gradient, which gates; the layer alone correlates."""
    torch.manual_seed(7)
    embedding, head = nn.Embedding(7, 5), ghl.Linear(5, 7, bias=False)
    head.weight = embedding.weight
    words = torch.tensor([1, 2, 3])

    def loss():
        return nn.functional.cross_entropy(head(embedding(words)), torch.tensor([2, 3, 0]))

    (G,) = torch.autograd.grad(loss(), head.weight)
    loss().backward()
    update = head.weight.grad
    assert update.abs().max() == 1
    assert torch.equal(update.sign(), G.sign() * (update != 0))


def test_layer_that_is_gone_leaves_an_ordinary_weight():
    """A weight outlives its layer without what the layer added."""
    torch.manual_seed(8)
    layer, plain = ghl.Linear(5, 4), nn.Linear(5, 4)
    plain.weight = layer.weight
    del layer
    square(plain, torch.randn(6, 5)).backward()
    (G,) = torch.autograd.grad(square(plain, torch.zeros(0, 5)), plain.weight)
    assert plain.weight.grad.abs().max() != 1
    assert not G.any()


def test_a_rule_that_is_refused_is_not_set():
    """The layer goes on with the one before, as does the other that has its weight."""
    tied, x = Tied(ghl.Linear, rule="ghl"), torch.randn(4, 5, dtype=D)
    square(tied, x).backward()
    with pytest.raises(ValueError, match="another layer has the same weight"):
        tied.first.rule = "hebb"
    assert tied.first.rule == tied.second.rule == Rule.preset("ghl")
    tied.zero_grad()
    square(tied, x).backward()
    assert tied.first.weight.grad.abs().max() == 1
