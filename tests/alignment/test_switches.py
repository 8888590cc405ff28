"""Layers have hooks on measured steps alone, which keep their place among those of others."""

import pytest
import torch
from torch import Tensor, nn

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
    """The layers with hooks of a forward, and the weights with one of their gradient."""
    modules = {n for n, m in model.named_modules() if m._forward_hooks}
    return modules | {n for n, p in model.named_parameters() if p._post_accumulate_grad_hooks}


def test_hooks_are_there_on_measured_steps_alone():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, every=3) as monitor:
        measured = hooked(model)
        assert {"0", "2", "3", "0.weight", "2.in_proj_weight", "2.out_proj.weight"} <= measured
        for number in range(7):
            assert monitor.measuring == (number % 3 == 0)
            assert hooked(model) == (measured if monitor.measuring else set())
            step(model, optimizer)
    assert not hooked(model)


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
    """The next is counted, whoever is called first."""
    reports = []
    for raises in (False, True):
        model = network()
        whole = nn.ModuleDict({"model": model}) if called == "in parts" else model
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
