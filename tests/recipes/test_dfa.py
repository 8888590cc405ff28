"""Direct feedback alignment and RandomNN: what each layer gets, by hand; seeds and checkpoints."""

import pytest
import torch
from torch import nn

from ghl.alignment import Monitor
from ghl.recipes.dfa import DFA
from ghl.recipes.random_nn import RandomNN


def network(seed=0):
    torch.manual_seed(1)
    blocks = [
        nn.Sequential(nn.Linear(3, 5), nn.Tanh()),
        nn.Sequential(nn.Linear(5, 4), nn.Tanh()),
        nn.Linear(4, 2),
    ]
    return DFA(blocks, (5, 4), 2, seed).double()


def test_gradients_by_hand():
    model = network()
    x, target = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    a, b, c = model.blocks[0][0], model.blocks[1][0], model.blocks[2]
    output = model(x)
    assert torch.equal(output, c(torch.tanh(b(torch.tanh(a(x))))))
    (output - target).square().sum().div(2).backward()
    with torch.no_grad():
        e = output - target
        h1 = torch.tanh(a(x))
        h2 = torch.tanh(b(h1))
        d1 = e @ model.feedback0 * (1 - h1**2)
        d2 = e @ model.feedback1 * (1 - h2**2)
    torch.testing.assert_close(a.weight.grad, d1.T @ x)
    torch.testing.assert_close(b.weight.grad, d2.T @ h1)
    torch.testing.assert_close(c.weight.grad, e.T @ h2)
    torch.testing.assert_close(b.bias.grad, d2.sum(0))


def test_feedback_to_tokens_is_shared_out():
    model = DFA([nn.Linear(3, 5), nn.Sequential(nn.Flatten(), nn.Linear(20, 2))], (5,), 2, 0)
    x = torch.randn(6, 4, 3)
    model(x).sum().backward()
    expected = torch.einsum("oh,ntc->hc", model.feedback0, x) / 4
    torch.testing.assert_close(model.blocks[0].weight.grad, expected)


def test_a_monitor_sees_the_signal_of_dfa():
    model = network()
    monitor = Monitor(model)
    x = torch.randn(6, 3).double()
    model(x).square().mean().backward()
    layer, found = model.blocks[0][0], monitor.report()["blocks.0.0"]
    S, B = -layer.weight.grad, layer.weight.detach() @ x.T @ x
    assert found["batch"]["cosine"] == pytest.approx(float((S * B).sum() / S.norm() / B.norm()))
    assert found["sample"] is not None


def test_dfa_learns_where_hidden_layers_must():
    """XOR of signs: no linear readout of a frozen random layer of 4 gets there as far."""
    torch.manual_seed(0)
    model = DFA([nn.Sequential(nn.Linear(2, 16), nn.Tanh()), nn.Linear(16, 1)], (16,), 1, 0)
    x = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]])
    y = x.prod(1, keepdim=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    for _ in range(500):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_matrices_come_from_the_seed_and_stay_in_the_checkpoint():
    a, b, other = network(7), network(7), network(8)
    assert torch.equal(a.feedback0, b.feedback0)
    assert not torch.equal(a.feedback0, other.feedback0)
    other.load_state_dict(a.state_dict())
    assert torch.equal(a.feedback1, other.feedback1)


def test_widths_must_fit():
    with pytest.raises(ValueError, match="widths has 1 numbers, must have 2"):
        DFA([nn.Linear(2, 2)] * 3, (2,), 2, 0)


def random_nn(parameters, **options):
    return RandomNN(3, parameters, 0, **options).double()


def test_updates_move_norms_to_their_targets():
    small, large = torch.randn(4, 3).double(), torch.randn(5).double()
    rule = random_nn([small, large], clip=0.01, target=1.0)
    x = torch.randn(6, 3).double()
    parameters = [small * 0.5, large * 2]
    for p, before, signal in zip(
        parameters, (small, large), rule.signals(x, parameters), strict=True
    ):
        assert signal.shape == p.shape
        assert float(signal.norm()) == pytest.approx(0.01 * float(before.norm()), rel=1e-6)
        outward = float((signal * p).sum())
        assert outward > 0 if p is parameters[0] else outward < 0


def test_norm_hovers_at_the_target():
    w = torch.randn(4, 3).double()
    rule = random_nn([w], clip=0.05, target=2.0)
    start, p = float(w.norm()), w.clone()
    for _ in range(400):
        p = p + rule.signals(torch.randn(6, 3).double(), [p])[0]
    assert float(p.norm()) == pytest.approx(2 * start, rel=0.05)


def test_random_nn_is_deterministic_and_in_its_checkpoint():
    w, x = torch.randn(4, 3).double(), torch.randn(6, 3).double()
    a, other = random_nn([w]), RandomNN(3, [w], 1).double()
    assert torch.equal(a.signals(x, [w])[0], random_nn([w]).signals(x, [w])[0])
    assert not torch.equal(a.signals(x, [w])[0], other.signals(x, [w])[0])
    other.load_state_dict(a.state_dict())
    assert torch.equal(a.signals(x, [w])[0], other.signals(x, [w])[0])


def test_stacked_random_networks_are_independent():
    w, x = torch.randn(2, 4, 3).double(), torch.randn(2, 6, 3).double()
    rule = RandomNN(3, [w], 0, stack=(2,)).double()
    both = rule.signals(x, [w])[0]
    x_other = x.clone()
    x_other[1] = 0
    changed = rule.signals(x_other, [w])[0]
    assert torch.equal(both[0], changed[0])
    assert not torch.equal(both[1], changed[1])


@pytest.mark.parametrize("options", [{"clip": 0.0}, {"target": float("nan")}])
def test_bad_shares(options):
    with pytest.raises(ValueError, match=r"(clip|target) is .*must be greater than 0"):
        random_nn([torch.zeros(2, 2)], **options)
