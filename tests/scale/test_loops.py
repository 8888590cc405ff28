"""Training loops of other shapes with `ghl.synchronize`: a GAN's, SAM's, a notebook's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghl

from .nets import backward, batch, expected, grads, loss_of, sgd, synchronized
from .world import assert_close

BOTH = (nn.Conv2d, nn.Linear)


def adversaries():
    torch.manual_seed(3)
    widths = {"generator": (3, 8, 6), "discriminator": (6, 8, 1)}
    nets = {n: nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c)).double()
            for n, (a, b, c) in widths.items()}  # fmt: skip
    for net in nets.values():
        ghl.swap(net, types=BOTH)
        net.optimizer = sgd(net, momentum=0.0)
        ghl.synchronize(net, net.optimizer)
    return nets["generator"], nets["discriminator"]


def play(generator, discriminator, none, early):
    """DCGAN's loop, which zeroes a discriminator's gradients before it is trained; early: also
    before the generator's backward goes through it."""
    source = torch.Generator().manual_seed(4)

    def loss(y, label):
        return F.binary_cross_entropy_with_logits(y, torch.full_like(y, label))

    for _ in range(4):
        real, noise = (torch.randn(5, n, generator=source).double() for n in (6, 3))
        discriminator.optimizer.zero_grad(set_to_none=none)
        loss(discriminator(real), 1.0).backward()
        fake = generator(noise)
        loss(discriminator(fake.detach()), 0.0).backward()
        discriminator.optimizer.step()
        if early:
            discriminator.optimizer.zero_grad()
        generator.optimizer.zero_grad(set_to_none=none)
        loss(discriminator(fake), 1.0).backward()
        generator.optimizer.step()
    return [p.detach() for net in (generator, discriminator) for p in net.parameters()]


@pytest.mark.parametrize("none", [True, False])
def test_a_generators_backward_through_a_discriminator_that_has_stepped(none):
    """What it adds to the discriminator's updates is zeroed before that one's next backward."""
    assert_close(play(*adversaries(), none, early=False), play(*adversaries(), True, early=True))


@pytest.mark.parametrize("rule", ["ghl", "hebb", "sign"])
@pytest.mark.parametrize("none", [True, False])
def test_no_step_uses_the_sum_of_an_update_and_a_gradient(none, rule):
    model, optimizer, _ = synchronized(rule=rule)
    untouched = copy.deepcopy(model.state_dict())
    for _ in range(2):
        model.load_state_dict(untouched)
        backward(model, "conv", 0)
        optimizer.step()
        before = [p.clone() for p in model.parameters()]
        backward(model, "conv", 1)
        with pytest.raises(RuntimeError, match=r"still held the update .* \(layer 'first.0'"):
            optimizer.step()
        assert_close(list(model.parameters()), before)
        optimizer.zero_grad(set_to_none=none)
    backward(model, "conv", 1)
    optimizer.step()


class SharpnessAware(torch.optim.Optimizer):
    """As published: climbs along the gradients that are there, then steps by the closure's."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, 0.1)
        self.climbs = []

    @torch.no_grad()
    def step(self, closure):
        parameters = self.param_groups[0]["params"]
        self.climbs = [0.05 * p.grad for p in parameters]
        torch._foreach_add_(parameters, self.climbs)
        self.zero_grad()
        torch.enable_grad()(closure)()
        torch._foreach_sub_(parameters, self.climbs)
        self.base.step()


def test_a_step_that_climbs_first():
    """Along updates, made by hand; by gradients of which none were made it is an error."""
    model, _, handle = synchronized()
    handle.remove()
    optimizer = SharpnessAware(model.parameters())
    handle = ghl.synchronize(model, optimizer)

    def closure():
        backward(model, "conv", 0)

    closure()
    with pytest.raises(RuntimeError, match=r"call merge\(\) on the handle"):
        optimizer.step(closure)
    optimizer.zero_grad()
    closure()
    handle.merge()
    updates = [p.grad.clone() for p in model.parameters()]
    optimizer.step(closure)
    assert_close(optimizer.climbs, [0.05 * update for update in updates])
    assert model.first[0].weight.grad.abs().max() == 1


def test_a_closure_that_is_called_many_times():
    """Weights change between its calls, by updates; what was held before is zeroed by the first."""
    model, _, handle = synchronized()
    handle.remove()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)
    ghl.synchronize(model, optimizer)
    calls = []

    def closure():
        calls.append(model.first[0].weight.detach().clone())
        optimizer.zero_grad()
        backward(model, "conv", 0)
        return torch.tensor(1.0)

    backward(model, "conv", 1)
    optimizer.step(closure)
    assert len(calls) > 1
    assert not torch.equal(calls[0], calls[1])


def test_synchronized_again_a_model_is_as_before():
    """A notebook's cell is run twice; not within an accumulation."""
    model, optimizer, former = synchronized()
    backward(model, "conv", 0)
    with pytest.raises(RuntimeError, match=r"'first.0' is synchronized already, .*zero_grad\(\)"):
        ghl.synchronize(model, optimizer)
    optimizer.zero_grad()
    again = ghl.synchronize(model, optimizer)
    former.remove()  # no longer its own
    backward(model, "conv", 0)
    optimizer.step()
    assert model.first[0].weight.grad.abs().max() == 1
    assert again._owes() is False


@pytest.mark.parametrize("how", ["unswap", "rule"])
def test_the_sum_of_an_update_and_a_gradient_goes_with_the_rule(how):
    """No ordinary gradient may be taken for one."""
    model, optimizer, handle = synchronized()
    backward(model, "conv", 0)
    optimizer.step()
    backward(model, "conv", 1)
    if how == "unswap":
        ghl.unswap(model)
    else:
        for layer in model.modules():
            if isinstance(layer, BOTH):
                layer.rule = "bp"
    assert model.first[0].weight.grad is None
    assert handle._owes() is False


def frozen(model, function):
    model.requires_grad_(False)
    function()
    model.requires_grad_(True)


def compiled(model):
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize("prepared", [lambda model: model, compiled])
@pytest.mark.parametrize("before", [False, True])
def test_a_backward_through_weights_frozen_since_the_forward_counts_for_nothing(prepared, before):
    """As that of a generator through its discriminator."""
    model, optimizer, _ = synchronized()
    whole = prepared(model)
    (x, target), (other, _) = batch("conv", 0), batch("conv", 1)
    if before:
        loss_of(whole(x), target).backward()
    loss = loss_of(whole(other), target)
    frozen(model, loss.backward)
    if not before:
        loss_of(whole(x), target).backward()
    optimizer.step()
    assert_close(grads(model), expected())


def test_a_weight_frozen_since_the_forward_keeps_the_update_of_the_last_step():
    model, optimizer, _ = synchronized()
    x, target = batch("conv", 0)
    loss_of(model(x), target).backward()
    optimizer.step()
    loss = loss_of(model(batch("conv", 1)[0]), target)
    frozen(model, loss.backward)
    assert_close(grads(model), expected())
    optimizer.step()


def test_sums_of_a_backward_that_a_hook_of_the_weight_ended():
    """They were added, and its gradient was not."""
    model, optimizer, _ = synchronized()
    x, target = batch("conv", 0)
    loss_of(model(x), target).backward()
    weight = model.first[0].weight
    hook = weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model(batch("conv", 1)[0]), target).backward()
    hook.remove()
    with pytest.raises(RuntimeError, match="a backward that raised an error has added"):
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model(x), target).backward()
    optimizer.step()
    assert_close(grads(model), expected())


def test_a_step_in_inference_mode():
    model, optimizer, _ = synchronized()
    x, target = batch("conv", 0)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(x), target).backward()
        with torch.inference_mode():
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    assert not any(p.grad.is_inference() for p in model.parameters())


@pytest.mark.parametrize("first", [False, True])
def test_an_optimizer_within_backward(first):
    """Whose hook may be older than ours."""
    weights = []
    for synchronizes in (False, True):
        torch.manual_seed(0)
        layer = ghl.Linear(6, 5, dtype=torch.float64)
        optimizer = sgd(layer)

        def step(weight, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        if first:
            layer.weight.register_post_accumulate_grad_hook(step)
        if synchronizes:
            ghl.synchronize(layer, optimizer)
        if not first:
            layer.weight.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            layer(torch.randn(4, 6, dtype=torch.float64)).sin().sum().backward()
        weights.append(layer.weight)
    assert_close(weights[:1], [w.detach() for w in weights[1:]])
