"""Signals whose alignment is known by hand, and the sign convention."""

import pytest
import torch
from torch import nn

from ghl.alignment import Monitor


class Given(torch.autograd.Function):
    """A loss whose gradient with respect to y is `g`."""

    @staticmethod
    def forward(ctx, y, g):
        ctx.save_for_backward(g)
        return y.sum() * 0

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0], None


def run(make_gradient, x=None, weight=None, **options):
    """Report of a bias-free layer of 3 neurons and 4 inputs that is given ∂ℓ/∂h = f(h)."""
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    if weight is not None:
        layer.weight.data.copy_(weight)
    x = torch.randn(6, 4, dtype=torch.float64) if x is None else x
    monitor = Monitor(nn.Sequential(layer), **options)
    h = layer(x)
    Given.apply(h, make_gradient(h.detach())).backward()
    return monitor.report()["0"]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_gradient_along_the_direction_is_anti_hebbian(sign):
    """∂ℓ/∂W = +B makes S = −B: −1; ∂ℓ/∂W = −B makes +1."""
    found = run(lambda h: sign * h / len(h))
    for part in ("batch", "sample"):
        assert found[part]["cosine"] == pytest.approx(-sign, abs=1e-12)
        assert found[part]["neurons"].tolist() == pytest.approx([-sign] * 3, abs=1e-12)
    assert found["hebbian_share"] == (sign == -1)
    assert found["anti_hebbian_share"] == (sign == 1)


def test_orthogonal_signal_is_zero():
    """Rows e1 and e2: h on the first neuron only, gradient on the second only."""
    x = torch.eye(4, dtype=torch.float64)[:1]
    weight = torch.zeros(3, 4, dtype=torch.float64)
    weight[0, 0] = 2.0
    found = run(lambda h: torch.tensor([[0.0, 5.0, 0.0]], dtype=torch.float64), x, weight)
    assert found["batch"]["cosine"] == 0
    assert found["batch"]["inner"] == 0
    assert found["sample"]["cosine"] == 0
    assert found["batch"]["neurons"].isnan().all(), "one of S and B is zero in every neuron"
    assert found["hebbian_share"] == found["anti_hebbian_share"] == 0


def test_orthogonal_in_each_neuron():
    """Neuron k sees h from x = e1 and its gradient from x = e2: rows do not overlap."""
    x = torch.eye(4, dtype=torch.float64)[:2]
    weight = torch.zeros(3, 4, dtype=torch.float64)
    weight[:, 0] = torch.tensor([1.0, 2.0, -3.0])
    g = torch.tensor([[0.0, 0, 0], [1.0, -1, 2]], dtype=torch.float64)
    found = run(lambda h: g, x, weight)
    assert found["batch"]["neurons"].tolist() == [0, 0, 0]
    assert found["batch"]["cosine"] == 0
    assert found["sample"] is None
    assert "zero" in found["gaps"]["sample"]


def test_neurons_apart():
    """The first neuron learns along B, the second against it, the third not at all."""
    found = run(lambda h: h * torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64))
    for part in ("batch", "sample"):
        assert found[part]["neurons"][:2].tolist() == pytest.approx([1, -1], abs=1e-12)
        assert found[part]["neurons"][2].isnan()
    assert found["hebbian_share"] == pytest.approx(1 / 3)
    assert found["anti_hebbian_share"] == pytest.approx(1 / 3)


def test_inner_products_by_hand():
    """One row: S = −g xᵀ, B = h xᵀ, ⟨S, B⟩ = −(g·h)‖x‖²; two equal rows of a mean loss: the same.

    x = (1, 2, 0, 0), w = e1 twice and 0: h = (1, 1, 0), g = (3, 1, 7): −4·5 = −20.
    """
    weight = torch.zeros(3, 4, dtype=torch.float64)
    weight[:2, 0] = 1
    row = torch.tensor([[1.0, 2, 0, 0]], dtype=torch.float64)
    g = torch.tensor([[3.0, 1, 7]], dtype=torch.float64)
    for n in (1, 2):
        found = run(lambda h, n=n: g.expand(n, 3) / n, row.expand(n, 4), weight)
        assert found["batch"]["inner"] == pytest.approx(-20)
        assert found["sample"]["inner"] == pytest.approx(-20)
        found = run(lambda h, n=n: g.expand(n, 3), row.expand(n, 4), weight, loss="sum")
        assert found["batch"]["inner"] == pytest.approx(-20)
        assert found["sample"]["inner"] == pytest.approx(-20)


def test_bias_is_no_part_of_the_direction():
    layer = nn.Linear(4, 3, dtype=torch.float64)
    layer.bias.data.fill_(100.0)
    monitor = Monitor(nn.Sequential(layer))
    x = torch.randn(6, 4, dtype=torch.float64)
    y = layer(x)
    Given.apply(y, -(y.detach() - 100.0)).backward()
    assert monitor.report()["0"]["batch"]["cosine"] == pytest.approx(1)


def test_whole_update_is_the_optimizers():
    """With a zero gradient, decay alone moves W: ΔW = −lr γ W, by hand against B."""
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    w = layer.weight.detach().clone()
    monitor = Monitor(nn.Sequential(layer))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, weight_decay=0.1)
    x = torch.randn(6, 4, dtype=torch.float64)
    Given.apply(layer(x), torch.zeros(6, 3, dtype=torch.float64)).backward()
    optimizer.step()
    found = monitor.report()["0"]
    B, change = w @ x.T @ x / 6, -0.05 * w
    assert found["update"]["inner"] == pytest.approx(float((B * change).sum()))
    assert found["update"]["cosine"] == pytest.approx(
        float((B * change).sum() / (B.norm() * change.norm()))
    )
    torch.testing.assert_close(
        found["update"]["neurons"], torch.cosine_similarity(B, change, dim=1)
    )
    assert found["batch"] is None
    assert "zero" in found["gaps"]["batch"]


def test_sign_flips():
    """Signs (+, −, 0, +) then (+, +, +, −): of three that have a sign in both, two flip."""
    layer = nn.Linear(4, 1, bias=False)
    monitor = Monitor(nn.Sequential(layer))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for signs in ([1.0, -1, 0, 1], [1.0, 1, 1, -1]):
        optimizer.zero_grad()
        layer(torch.tensor([signs])).sum().backward()
        optimizer.step()
    assert monitor.report()["0"]["sign_flips"] == pytest.approx(2 / 3)
