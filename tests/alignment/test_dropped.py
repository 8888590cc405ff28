"""Gradients that zero_grad drops before a step, whenever it comes: they are nobody's signal."""

import pytest
import torch
from torch import nn

import ghl
from ghl.alignment import Monitor
from tests.alignment.oracle import assert_same_report


def network(ruled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    if ruled:
        ghl.swap(model, types=nn.Linear, exclude=("2",))
    return model


def loss_of(model, seed):
    torch.manual_seed(seed)
    return model(torch.randn(6, 3).double()).square().mean()


@pytest.mark.parametrize("order", ["before the forward", "before the backward", "after another's"])
@pytest.mark.parametrize("ruled", [False, True], ids=["plain", "synchronized"])
def test_a_batch_that_was_dropped(ruled, order):
    """As by a step that a GradScaler left out, or by a second network's loss through the first."""
    reports = []
    for drops in (False, True):
        model = network(ruled)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        handle = ghl.synchronize(model, optimizer) if ruled else None
        with Monitor(model) as monitor:
            first = loss_of(model, 1) if order == "after another's" else None
            if drops:
                loss_of(model, 2).backward()
                if order == "before the forward":
                    optimizer.zero_grad()
            loss = loss_of(model, 1) if first is None else first
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            reports.append(monitor.report())
        if handle is not None:
            handle.remove()
    assert_same_report(*reports)


@pytest.mark.parametrize("ruled", [False, True], ids=["plain", "synchronized"])
def test_a_backward_through_weights_frozen_since_the_forward(ruled):
    """It adds no gradient, as that of a generator through its discriminator."""
    reports = []
    for frozen in (False, True):
        model = network(ruled)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        handle = ghl.synchronize(model, optimizer) if ruled else None
        with Monitor(model) as monitor:
            loss_of(model, 1).backward()
            if frozen:
                loss = loss_of(model, 2)
                model.requires_grad_(False)
                loss.backward()
                model.requires_grad_(True)
            optimizer.step()
            reports.append(monitor.report())
        optimizer.zero_grad()
        if handle is not None:
            handle.remove()
    assert_same_report(*reports)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_a_backward_called_within_autocast(kind):
    """Of a float32 forward, whose y an in-place ReLU has overwritten."""
    reports = []
    for inside in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(5, 4) if kind is nn.Linear else nn.Conv2d(2, 4, 3)
        x = torch.randn((9, 5) if kind is nn.Linear else (3, 2, 6, 6))
        model = nn.Sequential(layer, nn.ReLU(inplace=True))
        with Monitor(model) as monitor:
            loss = model(x).square().sum()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                loss.backward()
            monitor.step()
            reports.append(monitor.report()["0"]["sample"]["cosine"])
    assert reports[0] == reports[1]


def test_micro_batches_add_up_after_one_that_was_dropped():
    reports = []
    for drops in (False, True):
        model = network(False)
        with Monitor(model) as monitor:
            if drops:
                loss_of(model, 3).backward()
            losses = [loss_of(model, seed) for seed in (1, 2)]
            model.zero_grad()
            for loss in losses:
                loss.backward()
            reports.append(monitor.report())
    assert_same_report(*reports)


def dropped_before_the_step(model, optimizer):
    loss_of(model, 1).backward()
    optimizer.zero_grad()


def a_graph_kept_over_zero_grad(model, optimizer):
    loss = loss_of(model, 1)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()


def a_graph_kept_over_a_step(model, optimizer):
    late = loss_of(model[:1], 1)  # which asks for no weight that the step changes
    loss_of(model, 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    late.backward()


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (dropped_before_the_step, "its gradients were dropped"),
        (a_graph_kept_over_zero_grad, "the first has let go"),
        (a_graph_kept_over_a_step, "a forward of an earlier step"),
    ],
)
def test_what_cannot_be_told_is_a_gap_until_the_next_step(happens, reason):
    model = network(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model) as monitor:
        happens(model, optimizer)
        optimizer.step()
        found = monitor.report()["0"]
        assert found["batch"] is None and reason in found["gaps"]["layer"]
        optimizer.zero_grad()
        loss_of(model, 3).backward()
        assert monitor.report()["0"]["batch"]


def test_an_attack_in_evaluation_mode_is_dropped_with_its_gradients():
    model = network(False)
    with Monitor(model) as monitor:
        model.eval()
        loss_of(model, 1).backward()
        assert "evaluation mode" in monitor.report()["0"]["gaps"]["layer"]
        model.train()
        model.zero_grad()
        loss_of(model, 1).backward()
        assert monitor.report()["0"]["batch"]
