"""Networks that torch.compile has compiled: measured steps run eagerly, the others in graphs."""

import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ghl
from ghl.alignment import Monitor
from tests.alignment.oracle import assert_same_report


class Network(nn.Module):
    """torch 2.11 compiles no torch.nn class in place."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.linear = nn.Linear(54, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.convolution(x)).relu().flatten(1))


def network(rule: str | None) -> Network:
    torch.manual_seed(0)
    model = Network()
    if rule is not None:
        ghl.swap(model, rule)
    return model


def trained(model: nn.Module, called, monitor: Monitor, steps: int = 5) -> list:
    """The reports of the measured ones of so many steps."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    reports = []
    for _ in range(steps):
        x, measured = torch.randn(3, 2, 5, 5, generator=generator), monitor.measuring
        with monitor.eagerly():
            optimizer.zero_grad()
            called(x).square().mean().backward()
            optimizer.step()
        if measured:
            reports.append(monitor.report())
    return reports


def compiled_in_place(model, backend):
    model.compile(backend=backend, fullgraph=True)
    return model


COMPILED = {
    "module": lambda model, backend: torch.compile(model, backend=backend, fullgraph=True),
    "in place": compiled_in_place,
    "function": lambda model, backend: torch.compile(lambda x: model(x), backend=backend),
}


@pytest.mark.parametrize("rule", [None, "ghl"])
@pytest.mark.parametrize("way", COMPILED)
def test_reports_are_those_of_eager_steps(way, rule):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, eager = network(rule), network(rule)
    with Monitor(model, every=2) as monitor, Monitor(eager, every=2) as expected:
        reports = trained(model, COMPILED[way](model, counter), monitor)
        for found, same in zip(reports, trained(eager, eager, expected), strict=True):
            assert_same_report(found, same, rtol=1e-4, atol=1e-5)
    assert len(reports) == 3
    assert not reports[1]["linear"]["gaps"]
    assert counter.frame_count == 1


def test_without_it_compiled_layers_are_gaps_that_tell_of_it():
    torch._dynamo.reset()
    model = network(None)
    with Monitor(model) as monitor:
        monitor.eagerly = nullcontext
        (report, *_) = trained(model, torch.compile(model, backend="eager"), monitor, steps=1)
    assert "see Monitor.eagerly" in report["convolution"]["gaps"]["layer"]


def test_a_stance_of_the_users_comes_back():
    torch._dynamo.reset()
    model = network(None)
    called = torch.compile(model, backend="eager")
    x = torch.randn(3, 2, 5, 5)
    with Monitor(model, every=2) as monitor, torch.compiler.set_stance("fail_on_recompile"):
        with monitor.eagerly():
            called(x).sum().backward()
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            called(x)
        monitor.step()
        assert not monitor.measuring
        with monitor.eagerly(), pytest.raises(RuntimeError, match="fail_on_recompile"):
            called(x)


def test_where_nothing_is_compiled_the_compiler_is_not_imported(monkeypatch):
    model = network(None)
    with Monitor(model) as monitor:
        monkeypatch.delitem(sys.modules, "torch._dynamo")
        monkeypatch.setattr(torch.compiler, "set_stance", None)
        with monitor.eagerly():
            assert monitor.measuring
