"""Operations in place right after a layer overwrite its output; the update must not notice."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import ghl
from ghl_kernels import Rule

from .oracle import assert_like_reference, assert_update, record

OPERATIONS = {
    "relu_": F.relu_,
    "mul_": lambda y: y.mul_(2.5),
    "tanh_": torch.tanh_,
    "leaky_relu_": lambda y: F.leaky_relu(y, 0.3, inplace=True),
    "add_": lambda y: y.add_(torch.linspace(0, 1, y.shape[-1], dtype=y.dtype)),
    "slice": lambda y: y[..., :2].zero_(),
    "view": lambda y: y.view(-1).mul_(0.5),
    "twice": lambda y: y.mul_(2).relu_(),
}


class InPlace(nn.Module):
    """A layer and an operation on its output in place."""

    def __init__(self, layer, operation):
        super().__init__()
        self.layer, self.operation = layer, operation

    def forward(self, x):
        y = self.layer(x)
        self.operation(y)
        return y


def run_on(x):
    return lambda model: (model(x) - 0.3).square().sum()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("leading", [(), (7,), (3, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_after_linear(operation, leading, bias):
    """With one, two and three dimensions, of which autograd sees some as views."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias, dtype=torch.float64)
    x = torch.randn(*leading, 6, dtype=torch.float64)
    assert_like_reference(InPlace(layer, OPERATIONS[operation]), run_on(x))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("leading", [(), (3,)], ids=str)
def test_after_conv2d(operation, leading):
    """Batched and unbatched."""
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 5, 3, padding=1, dtype=torch.float64)
    x = torch.randn(*leading, 3, 6, 6, dtype=torch.float64)
    assert_like_reference(InPlace(layer, OPERATIONS[operation]), run_on(x))


def test_strided_linear_input():
    """F.linear takes another way for an input that is not contiguous."""
    torch.manual_seed(2)
    layer, x = nn.Linear(6, 5), torch.randn(4, 3, 6).transpose(0, 1)
    assert_like_reference(InPlace(layer, F.relu_), run_on(x))


def test_on_the_input_before_and_its_version_after():
    """x may come out of an operation in place; overwriting it later is autograd's own error."""
    torch.manual_seed(3)
    layer, x = ghl.Linear(6, 5), torch.randn(4, 6)
    y = layer(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_memory_of_the_output_is_shared():
    """What is saved for backward is the output itself, not a copy."""
    saved = []

    def pack(t):
        saved.append(t.data_ptr())
        return t

    for layer, x in (
        (ghl.Linear(6, 5), torch.randn(2, 4, 6)),
        (ghl.Conv2d(3, 5, 3), torch.randn(2, 3, 6, 6)),
    ):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        assert y.data_ptr() in saved


@pytest.mark.parametrize("in_place", [True, False])
def test_torchvision_vgg11(in_place):
    """torchvision's own model: the update of its first convolutions, either way of ReLU."""
    torch.manual_seed(4)
    plain = torchvision.models.vgg11(num_classes=10, init_weights=False).eval()
    x, target = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])

    def run(model):
        return F.cross_entropy(model(x), target)

    model = copy.deepcopy(plain)
    ghl.swap(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = in_place
    calls = record(plain, run)
    run(model).backward()
    for name in ("features.0", "features.3"):
        assert_update(model.get_submodule(name).weight, calls[name], Rule())


def test_in_place_or_not_is_the_same_update():
    """The recomputed output has the bits of the one that was overwritten."""
    torch.manual_seed(5)
    x, updates = torch.randn(2, 3, 8, 8), []
    model = nn.Sequential(
        ghl.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), ghl.Linear(8 * 36, 5), nn.ReLU()
    )
    for in_place in (True, False):
        model[1].inplace = model[4].inplace = in_place
        model.zero_grad()
        run_on(x)(model).backward()
        updates.append((model[0].weight.grad, model[3].weight.grad))
    for given, expected in zip(*updates, strict=True):
        assert torch.equal(given, expected)
