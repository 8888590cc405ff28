"""Layers have hooks on measured steps alone, which keep their place among those of others."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import ghl
from ghl.alignment import Monitor
from tests.alignment.oracle import assert_same_report


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.MultiheadAttention(4, 2), nn.Linear(4, 2))


def run(model: nn.Module) -> Tensor:
    h = model[1](model[0](torch.ones(5, 3)))
    return model[3](model[2](h, h, h)[0])


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    run(model).square().sum().backward()
    optimizer.step()


def hooked(model: nn.Module) -> set[str]:
    """The layers with hooks of a forward, and the weights with one of their gradient; but for
    attention, whose hooks are always there."""
    modules = {n for n, m in model.named_modules() if m._forward_hooks} - {"2"}
    return modules | {n for n, p in model.named_parameters() if p._post_accumulate_grad_hooks}


def test_hooks_are_there_on_measured_steps_alone():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, every=3) as monitor:
        for number in range(7):
            assert monitor.measuring == (number % 3 == 0)
            assert ("0" in hooked(model)) == monitor.measuring
            loss = run(model).square().sum()
            wanted = {"0", "3", "0.weight", "3.weight", "2.in_proj_weight", "2.out_proj.weight"}
            assert hooked(model) == (wanted if monitor.measuring else set())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert monitor.report()["2.in_proj"]["batch"]
    assert not hooked(model) and not model[2]._forward_hooks


def test_what_an_interrupt_within_attention_leaves_behind(monkeypatch):
    """Torch calls no hook of a forward that a KeyboardInterrupt has ended."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model) as monitor:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(nn.functional, "multi_head_attention_forward", interrupted)
            run(model)
        assert modes()
        step(model, optimizer)
        assert monitor.report()["2.in_proj"]["batch"]
    assert not modes()


def test_a_step_within_attention(monkeypatch):
    """Which is not over then."""
    model, softmax = network(), nn.functional.softmax

    def attention(*args, **kwargs):
        monitor.step()
        return softmax(*args, **kwargs)

    with Monitor(model) as monitor, monkeypatch.context() as patch:
        patch.setattr(nn.functional, "softmax", attention)
        run(model)
        assert monitor.steps == 1
    assert not modes()


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def modes():
    return torch.overrides._get_current_function_mode_stack()


def test_layers_of_several_optimizers_have_theirs_apart():
    model = network()
    first, second = (torch.optim.SGD(m.parameters(), 0.1) for m in (model[0], model[3]))
    with Monitor(model, every=2):
        step(model, first)
        assert not {"0", "0.weight"} & hooked(model)
        assert {"3", "3.weight"} <= hooked(model)
        second.step()
        assert not {"0", "3"} & hooked(model)
        first.step()
        assert "0" in hooked(model) and "3" not in hooked(model)


def test_a_weight_may_be_frozen_and_thawed_between_steps():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, every=2) as monitor:
        reports = []
        for number in range(6):
            model[3].weight.requires_grad_(number not in (1, 2, 3))
            step(model, optimizer)
            if number % 2 == 0:
                reports.append(monitor.report()["3"])
    gaps = [report["gaps"].get("layer") for report in reports]
    assert gaps == [None, "its weight is frozen", None]
    assert reports[2]["batch"]["cosine"]


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_layer_is_in_a_measured_step_counts(number):
    """Its rule and its dtype may have changed in a step that was not measured."""
    model = nn.Sequential(ghl.Linear(3, 2, rule="bp"))
    monitor = Monitor(model, every=3)
    for now in range(4):
        if now == number:
            model[0].rule = "ghl"
            model.double()
        model.zero_grad()
        model(torch.ones(4, 3, dtype=model[0].weight.dtype)).square().sum().backward()
        report = monitor.report()["0"]
        monitor.step()
    assert report["sample"] is None and "by a rule" in report["gaps"]["sample"]
    assert report["batch"]["neurons"].dtype == torch.float64


def test_a_step_that_ends_while_hooks_are_called():
    """In a hook of the layer that comes before ours; and in one between attention's two."""
    model, ends = network(), []

    def end(*call):
        if ends:
            ends.pop()()

    model[0].register_forward_hook(end)
    monitor = Monitor(model, every=2)
    model[2].register_forward_pre_hook(end)
    for calls in (1, 2):
        for _ in range(3):
            ends.extend([monitor.step] * calls)
            run(model)
    assert torch._C._len_torch_function_stack() == 0


def test_a_monitor_that_was_removed_puts_no_hooks_back():
    model = network()
    monitor = Monitor(model, every=2)
    monitor.step()
    monitor.remove()
    monitor.step()
    assert not hooked(model)


def test_a_model_that_holds_its_monitor_goes_with_it():
    model = network()
    model[0].register_forward_hook(lambda *call, model=model: None)
    model.monitor = Monitor(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


ORDERS = {  # of calls on measured steps, and on others
    "before": (["before", "ours"], ["before"]),
    "after": (["ours", "after"], ["after"]),
    "both": (["before", "ours", "after"], ["before", "after"]),
    "while off": (["ours", "after"], ["after"]),
    "in front": (["before", "ours"], ["before"]),
}


@pytest.mark.parametrize("others", ORDERS)
def test_their_place_among_the_hooks_of_others(others):
    """Which of them come before, and may change the output, stays as it was."""
    model, order, found = nn.Sequential(nn.Linear(3, 3)), [], []

    def add(name, **place):
        model[0].register_forward_hook(lambda *call: order.append(name), **place)

    if others in ("before", "both"):
        add("before")
    monitor = Monitor(model, every=2)
    monitor._after_forward = lambda *call: order.append("ours")
    if others in ("after", "both"):
        add("after")
    if others == "in front":
        add("before", prepend=True)
    for number in range(5):
        if others == "while off" and number == 1:
            add("after")
        order.clear()
        model(torch.ones(1, 3))
        found.append(list(order))
        monitor.step()
    on, off = ORDERS[others]
    assert found[2:] == [on, off, on]


@pytest.mark.parametrize("called", ["whole", "in parts"])
def test_a_step_that_raised_on_a_step_that_is_not_measured(called):
    """The next is counted, though it is only a part of what is measured that runs."""
    reports = []
    for raises in (False, True):
        model = network()
        whole = nn.ModuleList([nn.Linear(2, 2), model]) if called == "in parts" else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with Monitor(whole, every=2) as monitor:
            step(model, optimizer)
            if raises:
                optimizer.param_groups[0]["lr"], lr = "wrong", optimizer.param_groups[0]["lr"]
                with pytest.raises(TypeError):
                    step(model, optimizer)
                optimizer.param_groups[0]["lr"] = lr
            step(model, optimizer)
            step(model, optimizer)
            assert monitor.steps == 3
            reports.append(monitor.report())
    assert_same_report(*reports)
