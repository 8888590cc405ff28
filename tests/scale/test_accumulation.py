"""Updates of several backwards in one process: what is held, what is dropped, what is refused."""

import contextlib
import copy
import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ghl
from ghl.deferred.held import HeldSums
from ghl.sums import RawSums

from .nets import STEPS, alone, backward, batch, loss_of, make, sgd, synchronized, train
from .world import assert_close


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_step(model, optimizer):
    """What a step of four backwards hands to the optimizer."""
    backward(model, "conv", 0)
    optimizer.step()
    updates = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    return updates


def one_backward(model):
    """The same of a copy of the model that updates in backward."""
    model = copy.deepcopy(model)
    model.zero_grad()
    assert not any(isinstance(RawSums.present(p), HeldSums) for p in model.parameters())
    backward(model, "conv", 0, micro=1)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("name", ["conv", "transformer"])
def test_accumulation(name, micro, none):
    """Ten steps of four backwards are ten of one, however gradients are zeroed."""
    model, optimizer, _ = synchronized(name)
    assert_close(train(model, optimizer, name, micro, none=none), alone(name))


@pytest.mark.parametrize("none", [True, False])
def test_branch_that_a_step_does_not_use(none):
    """Its weight's update is zero, or None, as its gradient would be."""
    model, optimizer, _ = synchronized("branches")
    train(model, optimizer, "branches", none=none)
    weight = model.branch[0].weight
    before = weight.detach().clone()
    optimizer.zero_grad(set_to_none=none)
    model(torch.full((3, 2, 10, 10), -1.0, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert weight.grad is None if none else not weight.grad.any()
    assert torch.equal(weight, before) == none  # momentum moves what has a gradient of zero


@pytest.mark.parametrize("name", ["conv", "transformer"])
def test_compiled_model(name):
    model, optimizer, _ = synchronized(name)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(train(model, optimizer, name, forward=forward), alone(name))


def test_compiled_by_inductor():
    model, optimizer, _ = synchronized()
    forward = torch.compile(model, fullgraph=True)
    assert_close(train(model, optimizer, forward=forward), alone("conv"), 1e-10)


def test_compiled_autograd():
    """Equal; what zero_grad() drops without a step comes too late for it, and is an error."""
    layer, whole = ghl.Linear(3, 4), ghl.Linear(3, 4)
    whole.load_state_dict(layer.state_dict())
    x = torch.randn(8, 3)
    whole(x).square().sum().backward()
    optimizer = sgd(layer)
    handle = ghl.synchronize(layer, optimizer)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        for part in x.chunk(2):
            layer(part).square().sum().backward()
        for none in (True, False):
            handle.merge()
            assert_close([layer.weight.grad], [whole.weight.grad], 1e-5)
            optimizer.zero_grad()
            layer(-x).square().sum().backward()
            optimizer.zero_grad(set_to_none=none)
            with pytest.raises(RuntimeError, match="compiled autograd has taken up the sums"):
                layer(x).square().sum().backward()
            optimizer.zero_grad()
            handle.remove()
            handle = ghl.synchronize(layer, optimizer)
            layer(x).square().sum().backward()


def test_compiled_step():
    """Forward, backward and optimizer in one compiled function, which breaks at our hook."""
    model, optimizer, _ = synchronized()

    @torch.compile(backend="aot_eager")
    def step(x, target):
        for piece, wanted in zip(x.chunk(4), target.chunk(4), strict=True):
            loss_of(model(piece), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(STEPS):
        step(*batch("conv", number))
    assert_close(list(model.parameters()), alone("conv"))


def test_compiled_step_that_must_not_break_is_an_error():
    model, optimizer, _ = synchronized()
    backward(model, "conv", 0)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    """Reentrant checkpoints are backwards inside a backward; also of a layer used twice."""
    torch.manual_seed(0)
    layer = ghl.Linear(4, 4, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    ghl.synchronize(layer, optimizer := sgd(layer))
    y = checkpoint(layer, checkpoint(layer, x, use_reentrant=use_reentrant).tanh(),
                   use_reentrant=use_reentrant)  # fmt: skip
    y.square().sum().backward()
    optimizer.step()
    plain(plain(x).tanh()).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_reentrant_checkpoint_of_a_use_between_the_halves():
    """H0 of a second use waits for G of the embedding, and is not of a backward that raised."""
    embed = nn.Embedding(4, 4, dtype=torch.float64)
    layer = ghl.Linear(4, 4, bias=False, rule="hebb", dtype=torch.float64)
    layer.weight = embed.weight
    plain_embed, plain = copy.deepcopy((embed, layer))
    tokens = torch.randint(4, (20,))
    ghl.synchronize(layer, optimizer := sgd(layer))
    for raises in (True, False):
        optimizer.zero_grad()
        hidden = embed(tokens)
        if raises:
            hidden.register_hook(lambda _: 1 / 0)
        y = layer(checkpoint(layer, hidden, use_reentrant=True).tanh())
        with pytest.raises(ZeroDivisionError) if raises else contextlib.nullcontext():
            y.square().sum().backward()
    optimizer.step()
    plain(plain(plain_embed(tokens)).tanh()).square().sum().backward()
    torch.testing.assert_close(embed.weight.grad, plain_embed.weight.grad)


def test_reentrant_checkpoint_between_the_halves():
    """H0 of a head tied to the embedding waits for G while a checkpoint runs its own backward."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 4, dtype=torch.float64)
            self.block = ghl.Linear(4, 4, dtype=torch.float64)
            self.head = ghl.Linear(4, 11, bias=False, dtype=torch.float64)
            self.head.weight = self.embed.weight

        def forward(self, tokens, use_reentrant=None):
            x = self.embed(tokens)
            if use_reentrant is None:
                return self.head(self.block(x).tanh())
            return self.head(checkpoint(self.block, x, use_reentrant=use_reentrant).tanh())

    torch.manual_seed(0)
    model = Tied()
    plain, tokens = copy.deepcopy(model), torch.randint(11, (20,))
    ghl.synchronize(model, optimizer := sgd(model))
    F.cross_entropy(model(tokens, True), tokens.roll(1)).backward()
    optimizer.step()
    F.cross_entropy(plain(tokens), tokens.roll(1)).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("none", [True, False])
def test_batch_dropped_without_a_step(none):
    """zero_grad() in the place of a step leaves nothing for the next."""
    model, optimizer, _ = synchronized()
    expected = one_backward(model)
    backward(model, "conv", 7)
    optimizer.zero_grad(set_to_none=none)
    assert_close(one_step(model, optimizer), expected)


def test_sums_of_a_backward_that_raised_are_dropped():
    model, optimizer, _ = synchronized()
    expected = one_backward(model)

    def throw(gradient):
        raise KeyError("midway")

    handle = model.first[0].weight.register_hook(throw)
    with pytest.raises(KeyError):
        backward(model, "conv", 7)
    handle.remove()
    optimizer.zero_grad()
    assert_close(one_step(model, optimizer), expected)


def test_step_twice_uses_the_update_twice():
    """As with an ordinary gradient; it is not merged again."""
    model, optimizer, _ = synchronized(momentum=0.0)
    expected = [p - 0.04 * u for p, u in zip(model.parameters(), one_backward(model), strict=True)]
    backward(model, "conv", 0)
    optimizer.step()
    optimizer.step()
    assert_close(list(model.parameters()), expected)


def test_second_backward_without_synchronize_names_it():
    model = make("conv")
    with pytest.raises(RuntimeError, match=r"ghl.synchronize\(model, optimizer\)"):
        backward(model, "conv", 0, micro=2)


@pytest.mark.parametrize("argument", ["position", "keyword"])
def test_step_with_a_closure(argument):
    """Its gradients are made inside the step, as Lightning does, and merged there."""
    model, optimizer, _ = synchronized()
    for step in range(STEPS):

        def closure(step=step):
            optimizer.zero_grad()
            backward(model, "conv", step)
            return torch.tensor(7.0)

        loss = (
            optimizer.step(closure) if argument == "position" else optimizer.step(closure=closure)
        )
        assert loss == 7
    assert_close(list(model.parameters()), alone("conv"))


def test_two_optimizers():
    """Each merges the weights that it trains, in its own step."""
    model = make("conv")
    parts = [model.first, nn.ModuleList([model.second, model.head])]
    optimizers = [sgd(part) for part in parts]
    for optimizer in optimizers:
        ghl.synchronize(model, optimizer)
    for step in range(STEPS):
        backward(model, "conv", step)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    assert_close(list(model.parameters()), alone("conv"))


def test_rule_changed_and_model_converted():
    """The weights stay synchronized, with the new rule's sums."""
    model, optimizer, _ = synchronized()
    backward(model, "conv", 7)
    ghl.swap(model, ghl.Rule(gate="hebb", tau=0.5), types=(nn.Conv2d, nn.Linear))
    model.float().double()
    optimizer.zero_grad()
    expected = one_backward(model)
    assert_close(one_step(model, optimizer), expected)


def test_unswapped_model_has_ordinary_gradients():
    model, optimizer, _ = synchronized()
    ghl.unswap(model)
    plain = copy.deepcopy(model)
    given = one_step(model, optimizer)
    backward(plain, "conv", 0)
    assert_close(given, [p.grad for p in plain.parameters()])


def test_remove():
    """Updates are made in backward again, and may be synchronized anew."""
    model, optimizer, handle = synchronized()
    backward(model, "conv", 7)
    optimizer.zero_grad()
    handle.remove()
    model(batch("conv", 0)[0]).sum().backward()
    assert model.first[0].weight.grad.abs().max() == 1
    optimizer.zero_grad()
    ghl.synchronize(model, optimizer)
    assert_close(train(model, optimizer), alone("conv"))


def test_remove_after_unswap():
    model, _, handle = synchronized()
    ghl.unswap(model)
    handle.remove()
    model(batch("conv", 0)[0]).sum().backward()


def test_what_synchronize_refuses():
    _, optimizer, handle = synchronized()
    assert repr(handle) == "Synchronizer(3 weights, 1 rank)"
    for other in (nn.Linear(3, 3), ghl.Linear(3, 3, rule="bp")):
        with pytest.raises(ValueError, match="without a weight that a rule and the optimizer"):
            ghl.synchronize(other, sgd(other))
    with pytest.raises(ValueError, match="without a weight"):
        ghl.synchronize(make("conv"), optimizer)
    with pytest.raises(ValueError, match=r"communicate is torch\.int8, must be one of"):
        ghl.synchronize(make("conv"), optimizer, communicate=torch.int8)


def test_gradient_without_sums_is_an_error():
    layer = ghl.Linear(3, 3)
    optimizer = sgd(layer)
    ghl.synchronize(layer, optimizer)
    F.linear(torch.randn(4, 3), layer.weight).sum().backward()
    with pytest.raises(RuntimeError, match="use the weight through its layer"):
        optimizer.step()


def test_nothing_is_left_behind():
    """No state, no memory after a step, no object after the model."""
    model, optimizer, handle = synchronized()
    plain = make("conv")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert optimizer.state_dict().keys() == sgd(plain).state_dict().keys()
    backward(model, "conv", 0)
    sums = RawSums.present(model.first[0].weight)
    assert sums.hebbian.grad.dtype == torch.float64
    optimizer.step()
    assert sums.hebbian.grad is None
    assert sums.totals.grad is None
    watched = [weakref.ref(t) for t in (sums, handle, model.first[0].weight)]
    del model, optimizer, handle, sums
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3


def test_new_optimizer_without_synchronize_is_an_error():
    """Nobody would make updates of its gradients."""
    model, optimizer, handle = synchronized()
    backward(model, "conv", 0)
    del optimizer, handle
    gc.collect()
    optimizer = sgd(model)
    with pytest.raises(RuntimeError, match=r"is gone.*with the new one"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"is gone.*with the new one"):
        backward(model, "conv", 0)
    ghl.synchronize(model, optimizer)
    optimizer.zero_grad()
    assert_close(train(model, optimizer), alone("conv"))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_sums_arrive_in_any_order(order):
    """As a compiled backward delivers them: G, H0 and totals of a weight are three results."""
    layer = ghl.Linear(3, 4, dtype=torch.float64)
    optimizer = sgd(layer)
    handle = ghl.synchronize(layer, optimizer)
    layer(torch.rand(5, 3, dtype=torch.float64)).sum().backward()
    sums = RawSums.present(layer.weight)
    leaves = layer.weight, sums.hebbian, sums.totals
    grads = [leaf.grad.clone() for leaf in leaves]
    handle.merge()
    wanted = layer.weight.grad

    optimizer.zero_grad()
    torch.autograd.backward([leaves[i] for i in order], [grads[i] for i in order])
    handle.merge()
    assert torch.equal(layer.weight.grad, wanted)
