"""Training: every optimizer of torch.optim, parameter groups, and steps done by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghl
from ghl_kernels import Rule, reference

OPTIMIZERS = sorted(
    name
    for name, optimizer in vars(torch.optim).items()
    if isinstance(optimizer, type)
    and issubclass(optimizer, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, dtype=dtype), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(4 * 16, 3, dtype=dtype),
    )  # fmt: skip
    ghl.swap(model)
    return model


def batch(dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 2, 6, 6, generator=generator).to(dtype), torch.tensor([0, 1, 2, 1, 0])


def step(model, optimizer, x, target):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.item()


def test_list_of_optimizers_is_not_empty():
    """The optimizers of issue 2 are among those that torch offers here."""
    named = "SGD Adam AdamW RMSprop Adagrad NAdam RAdam Adamax ASGD Rprop Adadelta Adafactor"
    assert set(named.split()) <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_takes_the_update_as_gradient(name):
    """A step moves the weights as a step with weight.grad = update set by hand."""
    model, (x, target) = net(), batch()
    by_hand = copy.deepcopy(model)
    ghl.unswap(by_hand)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    other = getattr(torch.optim, name)(by_hand.parameters(), lr=0.01)
    before = model[0].weight.detach().clone()
    for _ in range(2):
        step(model, optimizer, x, target)
        for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
            q.grad = p.grad.clone()
        other.step()
    assert not torch.equal(model[0].weight, before)
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(p, q)


def test_optimizer_built_before_the_swap():
    """It holds the same Parameters, so it goes on working, state and all."""
    model, (x, target) = net(), batch()
    ghl.unswap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer, x, target)
    ghl.swap(model)
    before = model[0].weight.detach().clone()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    step(model, optimizer, x, target)
    update = model[0].weight.grad
    assert update.abs().max() == 1
    torch.testing.assert_close(model[0].weight, before - 0.1 * (0.9 * momentum + update))


def test_gradient_clipping():
    """clip_grad_norm_ scales the update in place; the next step starts afresh."""
    model, (x, target) = net(), batch()
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(x), target).backward()
        assert model[0].weight.grad.abs().max() == 1
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert model[0].weight.grad.norm() <= 0.1


def test_loss_falls():
    """Twenty steps on one batch learn it."""
    model, (x, target) = net(), batch()
    optimizer = torch.optim.SGD(ghl.param_groups(model, 0.05, 0.01), lr=0.05)
    losses = [step(model, optimizer, x, target) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_steps_by_hand():
    """Five steps of a swapped net against the rule worked out from the reference, in float64."""
    dtype, lr, rule = torch.float64, 0.05, Rule(tau=0.7)
    model = net(dtype)
    ghl.swap(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    w, b, v, c = (p.detach().clone().requires_grad_() for p in model.parameters())
    for seed in range(5):
        x, target = batch(dtype, seed)
        step(model, optimizer, x, target)

        y = F.conv2d(x, w, b)
        loss = F.cross_entropy(F.linear(y.relu().flatten(1), v, c), target)
        g, grad_b, grad_v, grad_c = torch.autograd.grad(loss, (y, b, v, c))
        update = reference.conv2d_update(x, y.detach(), g, w.detach(), rule).update
        with torch.no_grad():
            for p, change in ((w, update), (b, grad_b), (v, grad_v), (c, grad_c)):
                p -= lr * change
    for p, expected in zip(model.parameters(), (w, b, v, c), strict=True):
        torch.testing.assert_close(p.detach(), expected.detach(), rtol=1e-10, atol=1e-12)


def test_param_groups():
    """Weights with a rule apart from all else, each with its learning rate and decay."""
    model = net()
    hebbian, others = ghl.param_groups(model, lr=1e-3, lr_hebb=1e-2, wd=0.0, wd_hebb=5e-2)
    assert [id(p) for p in hebbian["params"]] == [id(model[0].weight)]
    assert (hebbian["lr"], hebbian["weight_decay"]) == (1e-2, 5e-2)
    assert {id(p) for p in others["params"]} == {
        id(p) for p in model.parameters() if p is not model[0].weight
    }
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.0)
    torch.optim.SGD([hebbian, others])


def test_param_groups_without_one_of_the_kinds():
    """Empty groups are left out, shared and frozen parameters counted once and not at all."""
    plain = nn.Linear(3, 3)
    (group,) = ghl.param_groups(plain, lr=0.1)
    assert len(group["params"]) == 2
    layer = ghl.Linear(3, 3, bias=False)
    tied = nn.Sequential(layer, ghl.Linear(3, 3))
    tied[1].weight = layer.weight
    hebbian, others = ghl.param_groups(tied, lr=0.1)
    assert len(hebbian["params"]) == len(others["params"]) == 1
    assert hebbian["lr"] == others["lr"] == 0.1
    with pytest.raises(ValueError, match="Linear without a trainable parameter"):
        ghl.param_groups(plain.requires_grad_(False), lr=0.1)
    for option in ("lr_hebb", "wd_hebb"):
        with pytest.raises(ValueError, match=rf"{option} is 0\.5, .* without a ghl layer"):
            ghl.param_groups(plain, lr=0.1, **{option: 0.5})
    with pytest.raises(TypeError, match=r"model is list, must be an nn\.Module"):
        ghl.param_groups([plain], lr=0.1)
