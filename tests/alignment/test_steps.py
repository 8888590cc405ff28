"""Whose step it is: closures, steps within steps, an optimizer for each layer, or none."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ghl.alignment import Monitor
from tests.alignment.oracle import assert_same_report


def model_of_two():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_optimizer_with_a_closure():
    """Measured as a step without one, if it is called once."""
    reports = []
    for kind in (None, torch.optim.SGD, torch.optim.LBFGS):
        torch.manual_seed(0)
        model = model_of_two()
        optimizer = (kind or torch.optim.SGD)(model.parameters(), lr=0.1)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3)).square().sum()
            loss.backward()
            return loss

        with Monitor(model) as monitor:
            if kind is None:
                closure()
            optimizer.step(closure if kind else None)
            reports.append(monitor.report())
    assert_same_report(*reports[:2])
    assert reports[1]["0"]["update"]
    assert reports[2]["0"]["gaps"]["layer"] == "optimizer.step called its closure more than once"


class Inner(torch.optim.SGD):
    """Steps within its own step, as subclasses and wrappers do, and takes more than a closure."""

    def step(self, closure=None, scale=1.0, evaluates=False):
        self.scale = scale
        if evaluates:
            closure(scale=scale)
        return super().step(None if evaluates else closure)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_closure_within_steps_within_steps(evaluates):
    """The optimizer gets what its step was given, and the steps are counted once."""
    torch.optim.SGD([torch.zeros(1)], 0.1)  # SGD.step itself has its hooks from now on
    reports = []
    for optimizer_class in (torch.optim.SGD, Inner):
        torch.manual_seed(0)
        model = model_of_two()
        optimizer = optimizer_class(model.parameters(), lr=0.1)

        def closure(scale=2.0, model=model, optimizer=optimizer):
            assert scale == 2.0
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()

        with Monitor(model) as monitor:
            for _ in range(3):
                more = (2.0, evaluates) if optimizer_class is Inner else ()
                optimizer.step(closure, *more)
            assert monitor.steps == 3
            reports.append(monitor.report())
    assert optimizer.scale == 2.0
    assert_same_report(*reports)


def test_a_weight_that_no_optimizer_has_is_measured_no_more():
    """Fine-tuning of a head whose backbone is not frozen."""
    model = model_of_two()
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    with Monitor(model, every=10) as monitor:
        measured = []
        for _ in range(30):
            measured.append(monitor.measuring)
            optimizer.zero_grad()
            model(torch.randn(2, 3)).sum().backward()
            optimizer.step()
        assert measured[10:] == [True, *[False] * 9] * 2
        assert monitor.report()["0"]["gaps"]["layer"] == "no optimizer has made a step with it"
        assert monitor.report()["2"]["step"] == 20
        torch.optim.SGD(model[0].parameters(), 0.1).step()
        track = monitor._by_name["0"]
        assert (track.steps, track.waits) == (1, False)


def test_an_optimizer_for_each_layer():
    """Many steps of others are no reason to wait, while all make their first."""
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(14)])
    optimizers = [torch.optim.SGD(layer.parameters(), 0.1) for layer in model]
    with Monitor(model, every=50) as monitor:
        model(torch.randn(2, 3)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert all(found["batch"] for found in monitor.report().values())


def test_an_optimizer_of_others_that_raised():
    class Broken(torch.optim.SGD):
        def step(self):
            raise RuntimeError("broken")

    model = model_of_two()
    optimizer, other = (
        t(m.parameters(), 0.1) for t, m in ((torch.optim.SGD, model), (Broken, nn.Linear(2, 2)))
    )
    monitor = Monitor(model)
    model(torch.randn(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="broken"):
        other.step()
    optimizer.step()
    assert monitor.steps == 1
    assert monitor.report()["0"]["update"]


@pytest.mark.parametrize("how", ["gone", "removed"])
@pytest.mark.parametrize("own", [True, False])
def test_a_monitor_may_go_while_hooks_of_a_step_are_called(how, own):
    """A garbage collection comes when it likes, also within another model's step."""
    model, other = model_of_two(), model_of_two()
    monitors = [Monitor(model)]

    def drop(*_):
        while monitors:
            monitor = monitors.pop()
            if how == "removed":
                monitor.remove()

    optimizer = torch.optim.SGD((model if own else other).parameters(), 0.1)
    handles = [
        register_optimizer_step_pre_hook(drop),
        register_optimizer_step_pre_hook(lambda *_: None),
    ]
    try:
        (model if own else other)(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    Monitor(model).remove()
