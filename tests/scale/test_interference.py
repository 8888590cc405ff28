"""What is done to a model, its gradients or its optimizers between a backward and the step."""

import copy
import functools
import gc

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ghl
from ghl.deferred import held

from .nets import BOTH, backward, batch, expected, grads, loss_of, make, sgd, synchronized
from .world import assert_close


def halves(model, between):
    """Two backwards of one batch, and what is done between them."""
    x, target = batch("conv", 0)
    loss_of(model(x[:9]), target[:9]).backward()
    between()
    loss_of(model(x[9:]), target[9:]).backward()


NOTHING = {
    "to": lambda model: model.to("cpu"),
    "load": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "share": lambda model: model.share_memory(),
    "double": lambda model: model.double(),
    "rule": lambda model: setattr(model.first[0], "rule", "ghl"),
    "swap": lambda model: ghl.swap(model, types=BOTH),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_no_layer_keeps_what_is_held(name):
    model, optimizer, _ = synchronized()
    halves(model, lambda: NOTHING[name](model))
    optimizer.step()
    assert_close(grads(model), expected())


def to_channels_last(model):
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.to(memory_format=torch.channels_last)


CHANGES = {
    "converted": (lambda model: model.float().double(), "moved, converted, given another rule"),
    "another rule": (lambda model: ghl.swap(model, "hebb", types=BOTH), "given another rule"),
    "bp and back": (
        lambda model: [setattr(model.first[0], "rule", rule) for rule in ("bp", "ghl")],
        "given another rule",
    ),
    "reordered": (to_channels_last, "another memory format"),
}


@pytest.mark.parametrize("when", ["between", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_change_within_an_accumulation_is_an_error(name, when):
    """Until zero_grad(), also after one that was caught."""
    change, message = CHANGES[name]
    for none in (True, False):
        model, optimizer, _ = synchronized()
        halves(model, functools.partial(change, model) if when == "between" else lambda: None)
        if when == "after":
            change(model)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                optimizer.step()
        optimizer.zero_grad(set_to_none=none)
        backward(model, "conv", 0)
        optimizer.step()


def test_synchronized_with_an_ordinary_gradient_is_an_error():
    model = make("conv", "bp")
    optimizer = sgd(model)
    backward(model, "conv", 0)
    ghl.swap(model, types=BOTH)
    ghl.synchronize(model, optimizer)
    backward(model, "conv", 0)
    with pytest.raises(RuntimeError, match="synchronized within an accumulation"):
        optimizer.step()


@pytest.mark.parametrize("first", [True, False])
def test_backward_with_inputs_is_an_error(first):
    """Its H0 is missing, though other micro-batches have one; autograd.grad leaves nothing."""
    model, optimizer, _ = synchronized()
    x, target = batch("conv", 0)
    for number in range(2):
        inputs = list(model.parameters()) if first == (number == 0) else None
        loss_of(model(x), target).backward(inputs=inputs)
    with pytest.raises(RuntimeError, match="without inputs="):
        optimizer.step()
    optimizer.zero_grad()
    halves(model, lambda: torch.autograd.grad(model(x).sum(), list(model.parameters())))
    optimizer.step()
    assert_close(grads(model), expected())


def test_sums_of_a_step_that_raised_are_lost_until_zero_grad():
    """Another weight's gradient had none."""
    model, layer = make("conv"), ghl.Linear(3, 3)
    both = nn.ModuleList([model, layer])
    optimizer = sgd(both)
    ghl.synchronize(both, optimizer)
    halves(model, lambda: layer.weight.sum().backward())
    with pytest.raises(RuntimeError, match=r"weight.grad of \(3, 3\) holds an ordinary gradient"):
        optimizer.step()
    layer.weight.grad = None
    backward(model, "conv", 0)
    with pytest.raises(RuntimeError, match="sums a step has used up that raised an error"):
        optimizer.step()
    optimizer.zero_grad()
    halves(model, lambda: None)
    optimizer.step()
    assert_close(grads(model), expected())


def test_backward_in_a_graph_and_step_outside_is_an_error(monkeypatch):
    model, optimizer, _ = synchronized()
    monkeypatch.setattr(held, "capturing", lambda: True)
    backward(model, "conv", 0)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, "conv", 0)
    monkeypatch.setattr(held, "capturing", lambda: False)
    with pytest.raises(RuntimeError, match=r"capture optimizer.step\(\) in the same graph"):
        optimizer.step()


@pytest.mark.parametrize("none", [True, False])
def test_remove_while_gradients_await_a_step_is_an_error(none):
    model, optimizer, handle = synchronized()
    backward(model, "conv", 0)
    with pytest.raises(RuntimeError, match=r"before remove\(\)"):
        handle.remove()
    optimizer.step()
    assert_close(grads(model), expected())
    handle.remove()
    _, _, handle = model, optimizer, ghl.synchronize(model, optimizer)
    optimizer.zero_grad()
    backward(model, "conv", 0)
    optimizer.zero_grad(set_to_none=none)
    handle.remove()


def new_zeros(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def test_gradient_replaced_by_zeros_drops_what_is_held():
    model, optimizer, _ = synchronized()
    backward(model, "conv", 7)
    new_zeros(model)
    backward(model, "conv", 0)
    optimizer.step()
    assert_close(grads(model), expected())


def test_copy_of_an_update_is_not_added_to():
    """Without synchronize; zeros may be, and autograd.grad adds nothing."""
    model = make("conv")
    backward(model, "conv", 0, micro=1)
    for p in model.parameters():
        p.grad = p.grad.clone()
    torch.autograd.grad(model(batch("conv", 0)[0]).sum(), list(model.parameters()))
    with pytest.raises(RuntimeError, match="already held a copy of an update"):
        backward(model, "conv", 0, micro=1)
    new_zeros(model)
    backward(model, "conv", 0, micro=1)
    assert_close(grads(model), expected())


def test_step_of_another_optimizer_is_an_error():
    """While gradients are held; with none, the other may be synchronized instead."""
    model, optimizer, _ = synchronized()
    other = sgd(model)
    backward(model, "conv", 0)
    with pytest.raises(RuntimeError, match="about to step with an ordinary gradient"):
        other.step()
    with pytest.raises(RuntimeError, match="is synchronized already"):
        ghl.synchronize(model, other)
    optimizer.step()
    other.step()
    optimizer.zero_grad()
    ghl.synchronize(model, other)
    model.load_state_dict(make("conv").state_dict())
    backward(model, "conv", 0)
    with pytest.raises(RuntimeError, match="about to step with an ordinary gradient"):
        optimizer.step()
    other.step()
    assert_close(grads(model), expected())


def test_a_backward_does_not_read_whether_an_update_was_zeroed(monkeypatch):
    """A GPU would be waited for."""
    model, optimizer, _ = synchronized()
    backward(model, "conv", 0)
    optimizer.step()
    with monkeypatch.context() as blind:
        blind.setattr(torch.Tensor, "any", None)
        backward(model, "conv", 0)
    with pytest.raises(RuntimeError, match="still held the update"):
        optimizer.step()


def test_an_optimizer_steps_on_when_the_last_synchronizer_is_gone():
    """The hook that watched it is called once more, among others."""
    layer = ghl.Linear(3, 4)
    ghl.synchronize(layer, sgd(layer))
    another = register_optimizer_step_pre_hook(lambda *arguments: None)
    del layer
    gc.collect()
    other = nn.Linear(3, 4)
    optimizer = sgd(other)
    for _ in range(2):
        other(torch.rand(5, 3)).sum().backward()
        optimizer.step()
    another.remove()


def teacher(model, copies):
    """A forward with another model's weights, as of a mean teacher, beside the gradient."""
    torch.func.functional_call(model, copies, (batch("conv", 0)[0],)).detach()


def freeze_and_load(model):
    model.requires_grad_(False)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.to("cpu")
    model.requires_grad_(True)


def replace_for_a_forward(model):
    layer = model.first[0]
    weight, layer.weight = layer.weight, nn.Parameter(layer.weight.detach().clone())
    model(batch("conv", 0)[0])
    layer.weight = weight


def call_with_a_computed_weight(model):
    computed = {n: p * 1.0 for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="must be a leaf"):
        torch.func.functional_call(model, computed, (batch("conv", 0)[0],))


BESIDE = {
    "teacher": lambda model: teacher(model, dict(make("conv").named_parameters())),
    "copies": lambda model: teacher(model, {n: p.clone().detach().requires_grad_()
                                            for n, p in model.named_parameters()}),
    "frozen and loaded": freeze_and_load,
    "replaced for a forward": replace_for_a_forward,
    "a computed weight": call_with_a_computed_weight,
}  # fmt: skip


@pytest.mark.parametrize(
    ("when", "name"),
    [
        (when, name)
        for when in ("after the forward", "between", "after")
        for name in BESIDE
        # autograd itself lets no weight change between a forward and its backward
        if (when, name) != ("after the forward", "frozen and loaded")
    ],
)
def test_what_is_held_outlives_other_weights_of_a_layer(when, name):
    """And what a forward has begun, with synchronize and without."""
    model, optimizer, _ = synchronized()
    if when == "after the forward":
        x, target = batch("conv", 0)
        for given in (model, plain := make("conv")):
            loss = loss_of(given(x), target)
            BESIDE[name](given)
            loss.backward()
        assert_close(grads(plain), expected())
    else:
        halves(model, (lambda: BESIDE[name](model)) if when == "between" else lambda: None)
        if when == "after":
            BESIDE[name](model)
    optimizer.step()
    assert_close(grads(model), expected())


def test_a_layer_that_has_had_other_weights_can_be_plain_again():
    model = make("conv")
    BESIDE["teacher"](model)
    ghl.unswap(model)
    backward(model, "conv", 0, micro=1)
    plain = make("conv", "bp")
    backward(plain, "conv", 0, micro=1)
    assert_close(grads(model), grads(plain))


LOST = {
    "synchronized": lambda model: ghl.synchronize(model, sgd(model)),
    "bp and back": lambda model: [setattr(model.first[0], "rule", r) for r in ("bp", "ghl")],
    "reordered": lambda model: model.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("synchronized", False),
        *((n, b) for n in ("bp and back", "reordered") for b in (True, False)),
    ],
)
def test_a_change_between_a_forward_and_its_backward_is_an_error(name, before):
    """Whether the model was synchronized before or not."""
    model, optimizer, _ = synchronized() if before else (make("conv"), None, None)
    x, target = batch("conv", 0)
    loss = loss_of(model(x), target)
    LOST[name](model)
    with pytest.raises(RuntimeError, match="between a forward and its backward"):
        loss.backward()
    del optimizer


def test_micro_batches_without_a_gradient_keep_their_sums():
    """H0 does not need a gradient."""
    model, optimizer, _ = synchronized("conv", "hebb")
    whole = make("conv", "hebb")
    x, _ = batch("conv", 0)
    for given, pieces in ((model, 3), (whole, 1)):
        for piece in x.chunk(pieces):
            (given(piece) * 0).sum().backward()
    optimizer.step()
    assert_close(grads(model), grads(whole))


def test_sums_beside_a_gradient_of_zeros_are_not_forgotten():
    model, optimizer, handle = synchronized("conv", "hebb")
    x, target = batch("conv", 0)
    (model(x) * 0).sum().backward()
    with pytest.raises(RuntimeError, match="gradients are held"):
        handle.remove()
    model.first[0].rule = "ghl"
    loss_of(model(x), target).backward()
    with pytest.raises(RuntimeError, match="whose sums are gone"):
        optimizer.step()
    optimizer.zero_grad()
    handle.remove()


@pytest.mark.parametrize("rule", ["hebb", "ghl"])
def test_a_batch_that_was_dropped_in_place_moves_nothing(rule):
    """By zeroing its gradients before the step."""
    model, optimizer, _ = synchronized("conv", rule, momentum=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, "conv", 0)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert_close(list(model.parameters()), before, 1e-300)


def test_float16_weights_stay_finite_whatever_the_scale():
    """Updates are not multiplied by a scale that float16 does not hold."""
    model = make("conv", dtype=torch.float16)
    optimizer = sgd(model, fused=True)
    ghl.synchronize(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    x, target = batch("conv", 0, torch.float16)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(loss_of(model(x), target, 1e-3)).backward()
    scaler.step(optimizer)
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_process_group_made_after_synchronize_is_an_error(monkeypatch):
    model, optimizer, _ = synchronized()
    backward(model, "conv", 0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    with pytest.raises(RuntimeError, match=r"a process group was made after ghl\.synch"):
        optimizer.step()
