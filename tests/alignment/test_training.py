"""A Monitor changes no bit of what it measures, and its steps are the optimizer's."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import ghl
from ghl.alignment import Monitor
from tests.alignment.oracle import assert_same_report


def network():
    """Everything with state or chance: batch norm, dropout, attention, operations in place, and a
    spectral norm, which takes a step whenever its weight is looked at."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.TransformerEncoderLayer(9, 3, 16, dropout=0.2, batch_first=True),
        nn.Flatten(),
        nn.Linear(72, 4),
        nn.Dropout(0.3),
        spectral_norm(nn.Linear(4, 4)),
    )


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
}


def train(optimizer, monitored, swap=False, **options):
    torch.manual_seed(3)
    model = network()
    if swap:
        ghl.swap(model, types=(nn.Conv2d, nn.Linear), exclude=("4", "8"))
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    monitor = Monitor(model, **options) if monitored else None
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(6, 2, 7, 7)).square().mean().backward()
        optimizer.step()
    if monitor:
        gaps = [name for name, found in monitor.report().items() if not found["batch"]]
        assert gaps == ["8"]
        monitor.remove()
    return model.state_dict(), optimizer.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{"every": 1}, {"every": 2, "hebbian": "ghl"}], ids=str)
@pytest.mark.parametrize("swap", [False, True], ids=["plain", "swapped"])
def test_training_is_bit_identical(optimizer, options, swap):
    without, with_monitor = (train(optimizer, m, swap, **options) for m in (False, True))
    assert torch.equal(without[2], with_monitor[2]), "random numbers were drawn"
    for name, value in without[0].items():
        assert torch.equal(value, with_monitor[0][name]), name
    states = (without[1]["state"], with_monitor[1]["state"])
    for key, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name]))


def test_only_measured_steps_are_looked_at(monkeypatch):
    looked = []
    monkeypatch.setattr("ghl.alignment.sums.Sums.add", lambda self, use, *g: looked.append(use))
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, every=3)
    measured = []
    for _ in range(7):
        before = len(looked)
        expected = monitor.measuring
        model(torch.randn(2, 3)).sum().backward()
        assert (len(looked) > before) == expected
        measured.append(expected)
        optimizer.step()
    assert measured == [True, False, False, True, False, False, True]


def test_report_is_of_the_last_measured_step():
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, every=2)
    steps = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(2, 3)).square().sum().backward()
        optimizer.step()
        steps.append(monitor.report()["0"]["step"])
    assert steps == [0, 0, 2, 2]
    assert monitor.report()["0"]["sign_flips"] is not None, "signs of step 1 against step 2"


def test_every_fifth_step_says_what_every_step_says():
    """What a step reports does not depend on how often the Monitor looks."""
    reports = []
    for every in (1, 5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        monitor = Monitor(model, every=every)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(2, 3)).square().sum().backward()
            optimizer.step()
        reports.append(monitor.report())
    assert_same_report(*reports, rtol=0, atol=0)


def halves(x, run):
    for part in x.chunk(2):
        (run(part).square().sum() / len(x)).backward()


def two_uses(model, x):
    a, b = x.chunk(2)
    (torch.cat([model(a), model(b)]).square().sum() / len(x)).backward()


@pytest.mark.parametrize("how", ["accumulation", "two uses", "checkpoint", "reentrant", "twice"])
def test_parts_of_a_batch_add_up(how):
    """Micro-batches, several uses in a forward, recomputation: the numbers of one whole batch."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    with Monitor(model) as monitor:
        (model(x).square().sum() / 6).backward()
        whole = monitor.report()
    model.zero_grad()
    monitor = Monitor(model)
    if how == "accumulation":
        halves(x, model)
    elif how == "two uses":
        two_uses(model, x)
    elif how == "twice":  # two losses of one forward, one backward each
        y = model(x)
        (y[:, 0].square().sum() / 6).backward(retain_graph=True)
        (y[:, 1].square().sum() / 6).backward()
    else:
        y = checkpoint(model, x, use_reentrant=how == "reentrant")
        (y.square().sum() / 6).backward()
    found = monitor.report()
    parts = ("batch",) if how == "twice" else ("batch", "sample")
    for name in whole:
        for part in parts:
            torch.testing.assert_close(found[name][part], whole[name][part])
    if how == "twice":
        assert found["0"]["sample"] is None
        assert "several backwards" in found["0"]["gaps"]["sample"]


@pytest.mark.parametrize("memory", ["unbatched", "channels_last"])
def test_images_in_other_forms_give_the_same_numbers(memory):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(inplace=True)).double()
    x, reports = torch.randn(1, 4, 8, 8).double(), []
    for form in ("plain", memory):
        if form == "channels_last":
            model.to(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last)
        model.zero_grad()
        with Monitor(model) as monitor:
            model(x[0] if form == "unbatched" else x).square().mean().backward()
            reports.append(monitor.report())
    assert_same_report(*reports)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["transposed", "expanded"])
def test_rows_in_two_dimensions_are_those_in_one(form, bias):
    """F.linear multiplies and adds in other nodes there: the signal is what weight.grad says."""
    model = nn.Sequential(nn.Linear(5, 4, bias=bias)).double()
    x = torch.randn(3, 2, 5).double().transpose(0, 1) if form == "transposed" else (
        torch.randn(3, 1, 5).double().expand(3, 2, 5)
    )  # fmt: skip
    monitor = Monitor(model)
    model(x).sum().backward()
    rows, w = x.reshape(-1, 5), model[0].weight
    S, B = -w.grad, (rows @ w.detach().T).T @ rows
    found = monitor.report()["0"]["batch"]
    assert found["cosine"] == pytest.approx(float((S * B).sum() / S.norm() / B.norm()))


def test_gradients_that_were_dropped_do_not_count():
    model = nn.Sequential(nn.Linear(3, 4)).double()
    x, other = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    with Monitor(model) as monitor:
        model(x).square().mean().backward()
        expected = monitor.report()
    model.zero_grad()
    monitor = Monitor(model)
    model(other).square().mean().backward()
    model.zero_grad()
    model(x).square().mean().backward()
    assert_same_report(monitor.report(), expected)


def test_layers_with_one_weight_are_measured_together():
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, b).double()
    x = torch.randn(5, 3).double()
    monitor = Monitor(model)
    model(x).square().mean().backward()
    report = monitor.report()
    assert report["0"] is report["1"]
    w = a.weight.detach()
    h = x @ w.T
    B = (h.T @ x + (h @ w.T).T @ h) / 10
    S = -a.weight.grad
    cosine = (S * B).sum() / (S.norm() * B.norm())
    assert report["0"]["batch"]["cosine"] == pytest.approx(float(cosine))


@pytest.mark.parametrize("rule", ["ghl", "hebb"])
def test_a_rules_own_update_is_the_signal_of_a_swapped_layer(rule):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    ghl.swap(model, rule, types=nn.Linear, exclude=("2",))
    x = torch.randn(6, 3).double()
    monitor = Monitor(model)
    model(x).square().mean().backward()
    w, found = model[0].weight.detach(), monitor.report()["0"]
    B, S = w @ x.T @ x, -model[0].weight.grad
    assert found["batch"]["cosine"] == pytest.approx(float((S * B).sum() / S.norm() / B.norm()))
    assert "by a rule" in found["gaps"]["sample"]
    assert monitor.report()["2"]["sample"] is not None


def merged_and_not(synchronized, monitor_first):
    """Reports of three steps of a swapped layer, with ghl.synchronize or without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    ghl.swap(model, types=nn.Linear, exclude=("2",))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handles = [Monitor(model)] if monitor_first else []
    if synchronized:
        handles.append(ghl.synchronize(model, optimizer))
    monitor = handles[0] if monitor_first else Monitor(model)
    reports = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(6, 3).double()).square().mean().backward()
        if synchronized:
            assert "made in optimizer.step()" in monitor.report()["0"]["gaps"]["layer"]
        optimizer.step()
        reports.append(monitor.report())
    return reports


@pytest.mark.parametrize("monitor_first", [False, True])
def test_the_signal_of_a_synchronized_layer_is_the_merged_update(monitor_first):
    """Whichever came first: the update is made in a hook before the step, and so is the report."""
    plain, synchronized = (merged_and_not(s, monitor_first) for s in (False, True))
    for one, other in zip(plain, synchronized, strict=True):
        assert_same_report(one, other)


def test_a_step_within_a_step_is_one():
    """A subclass of an optimizer calls its base's step, and both call every hook."""

    class Twice(torch.optim.SGD):
        def step(self):
            super().step()
            super().step()

    torch.optim.SGD([torch.zeros(1)], 0.1)  # SGD.step itself has its hooks from now on
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    optimizer = Twice(model.parameters(), 0.1)
    monitor = Monitor(model)
    for step in range(3):
        optimizer.zero_grad()
        before = model[0].weight.detach().clone()
        x = torch.randn(5, 3).double()
        model(x).square().mean().backward()
        optimizer.step()
        found = monitor.report()["0"]
        B = before @ x.T @ x / 5
        assert (found["step"], monitor.steps) == (step, step + 1)
        change = model[0].weight.detach() - before
        assert found["update"]["inner"] == pytest.approx(float((change * B).sum()))


def test_an_evaluation_with_a_graph_is_no_use():
    """Whose gradient would be missed; that of a probe in the middle of a step."""
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    optimizer, reports = torch.optim.SGD(model.parameters(), 0.0), []
    with Monitor(model) as monitor:
        for evaluates in (False, True):
            if evaluates:
                model.eval()(x)
                model.train()
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            reports.append(monitor.report()["0"])
    assert not {"layer"} & reports[1]["gaps"].keys()
    assert reports[0]["batch"]["cosine"] == reports[1]["batch"]["cosine"]


def test_a_step_that_raised_is_forgotten():
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model)
    for fails in (True, False):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.param_groups[0]["lr"] = None if fails else 0.1
        if fails:
            with pytest.raises(TypeError):
                optimizer.step()
        else:
            optimizer.step()
    assert monitor.steps == 1
    assert monitor.report()["0"]["update"]["cosine"]


def test_a_run_that_goes_on_counts_on():
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, every=4, start=6)
    measured = []
    for _ in range(4):
        measured.append(monitor.measuring)
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    assert measured == [False, False, True, False]
    assert monitor.report()["0"]["step"] == 8


def test_the_copy_of_a_model_is_not_measured(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4))
    monitor = Monitor(model)
    twin = copy.deepcopy(model)
    twin(torch.randn(2, 3)).sum().backward()
    assert "did not run" in monitor.report()["0"]["gaps"]["layer"]
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    loaded(torch.randn(2, 3))


def test_a_monitor_without_references_is_gone():
    """And so are its hooks."""
    model = nn.Sequential(nn.Linear(3, 4))
    Monitor(model)
    assert not model[0]._forward_hooks
    assert not model[0].weight._post_accumulate_grad_hooks
    with Monitor(model) as monitor:
        model(torch.randn(2, 3)).sum().backward()
        assert monitor.report()["0"]["batch"]


def test_signals_that_are_given():
    """A rule of its own under no_grad: S as given, B from the forwards in training mode."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False)).double()
    monitor = Monitor(model, signal="given", every=2)
    x = torch.randn(6, 3).double()
    with torch.no_grad():
        model(x)
        B = model[0].weight @ x.T @ x / 6
    monitor.measure("0", 2 * B)
    monitor.measure("0", B)
    found = monitor.report()["0"]
    assert found["batch"]["cosine"] == pytest.approx(1)
    assert found["batch"]["inner"] == pytest.approx(float(3 * B.square().sum()))
    monitor.step()
    monitor.measure("0", -B)  # of a step that is not measured
    assert monitor.report()["0"]["batch"]["cosine"] == pytest.approx(1)
    monitor.step()
    with torch.no_grad():
        model(x)
    assert "no signal" in monitor.report()["0"]["gaps"]["layer"]
    monitor.measure("0", -B)
    assert monitor.report()["0"]["batch"]["cosine"] == pytest.approx(-1)
