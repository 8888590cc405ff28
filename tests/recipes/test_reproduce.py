"""`ghl reproduce`: stacks against single networks, the fits, reports of trials."""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ghl.alignment import Monitor
from ghl.cli import main
from ghl.recipes.random_nn import RandomNN
from ghl.recipes.reproduce import (
    command,
    dynamics,
    options,
    phase,
    phase_diagram,
    regression,
    report,
    rules,
    sce,
    sre,
    sweep,
    table,
    transformer_noise,
)
from ghl.recipes.reproduce import transformer as transformer_cells
from ghl.recipes.reproduce.students import Learner, Stack, alignment, squared_error
from tests.recipes.students import single


@pytest.mark.parametrize(("rule", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_a_stack_trains_as_its_networks_do_alone(rule, kind):
    """Weights, and the alignment beside a Monitor's, with different decays."""
    stack = Stack((4, 6, 6, 3), [0, 1], "tanh")
    decays = (0.0, 0.3)
    alone = [single(stack, i) for i in range(2)]
    optimizers = [
        kind(m.parameters(), 0.05, weight_decay=d) for m, d in zip(alone, decays, strict=True)
    ]
    monitors = [Monitor(m) for m in alone]
    learner = Learner(stack, rule, 0.05, torch.tensor(decays), 0)
    x, y = torch.randn(5, 2, 7, 4), torch.randn(5, 2, 7, 3)
    for step in range(5):
        _, layers = learner.gradients(x[step], squared_error(y[step]))
        cosines = alignment(stack, layers, 1)
        learner.step()
        for i, model in enumerate(alone):
            optimizers[i].zero_grad()
            (model(x[step, i]) - y[step, i]).square().mean().backward()
            optimizers[i].step()
            found = monitors[i].report()["2"]["batch"]["cosine"]
            assert float(cosines[i]) == pytest.approx(found, abs=1e-5)
    for i, model in enumerate(alone):
        torch.testing.assert_close(stack.weights[1][i], model[2].weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["sgd", "dfa", "random"])
def test_a_seed_is_the_same_network_in_any_stack(rule):
    """DFA's and RandomNN's own numbers belong to the stack, what SGD draws to the seed."""
    settings = sre.Students(rule, 0.1, steps=6, batch=8, examples=16, validation=8, every=1)
    first = sre.train(settings, [3, 4], torch.zeros(2))
    again = sre.train(settings, [3, 4], torch.zeros(2))
    assert first == again
    if rule == "sgd":
        alone = sre.train(settings, [3], torch.zeros(1))
        assert alone["cosine"][0] == pytest.approx(first["cosine"][0], abs=1e-6)


def test_noise_is_added_with_its_deviation():
    stack = Stack((64, 64), [0, 1], "tanh")
    before = stack.weights[0].detach().clone()
    Learner(stack, "sgd", 0.1, torch.zeros(2), 0, noise=torch.tensor([0.0, 0.5])).shake()
    change = stack.weights[0].detach() - before
    assert not change[0].any()
    assert float(change[1].std()) == pytest.approx(0.5, rel=0.05)


def test_closed_form_of_linear_regression():
    """The formula against its own integral by many random w, and the Monitor exactly."""
    x, y, v = torch.randn(3, 2).double(), torch.randn(3).double(), torch.randn(2).double()
    w = v + 0.7 * torch.randn(400_000, 2).double()
    wx = w @ x.T
    sampled = -((wx - y) * wx).mean(0) * x.square().sum(1)
    closed = phase.regression_alignment(x, y, v, 0.7)
    torch.testing.assert_close(sampled, closed, rtol=0.03, atol=0.03)
    assert regression.measured(x, y, v, 0.7) == pytest.approx(float(closed.mean()), rel=1e-12)


SIGMAS = tuple(np.geomspace(1e-3, 1e-2, 6))
fit = functools.partial(phase.fit, resamples=200)


def grid(power, noise=0.0, floor=1e-9, sigmas=SIGMAS):
    """Alignments whose boundary is γ = floor + 1000 σ^power, for three seeds."""
    sigmas, gammas = np.array(sigmas), np.geomspace(1e-12, 1e1, 240)
    clean = np.log(gammas)[None] - np.log(floor + 1000 * sigmas**power)[:, None]
    seeds = np.random.default_rng(0).normal(0, noise, (3, *clean.shape))
    cosines = np.tanh(clean / 4)[..., None] + seeds.transpose(1, 2, 0)
    return phase.Boundary(list(sigmas), list(gammas), cosines)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_exponent_of_a_known_boundary(power):
    exact = fit(grid(power), grid(power, sigmas=[0.0]))
    assert exact["exponent"] == pytest.approx(power, abs=0.02)
    noisy = fit(grid(power, noise=0.05), grid(power, noise=0.05, sigmas=[0.0]))
    low, high = noisy["interval"]
    assert low < power < high
    assert high - low > exact["interval"][1] - exact["interval"][0]


def test_a_boundary_without_noise_is_taken_off():
    """γ = γ₀ + 1000 σ²: the plain exponent is too small, beyond γ₀ it is 2."""
    floor = 1e-3
    found = fit(grid(2.0, floor=floor), grid(2.0, floor=floor, sigmas=[0.0]))
    assert found["floor"] == pytest.approx(floor, rel=0.02)
    assert found["exponent"] < 1.95
    assert found["exponent_above"] == pytest.approx(2.0, abs=0.05)


def test_a_boundary_off_the_grid_is_told():
    def cut(boundary, count):
        return phase.Boundary(boundary.noises, boundary.decays[:count], boundary.cosines[:, :count])

    whole, floor = grid(2.0), grid(2.0, sigmas=[0.0])
    found = fit(cut(whole, 185), floor)
    assert found["left_out"] == whole.noises[len(found["noise"]) :]
    assert 3 <= len(found["noise"]) < 6
    with pytest.raises(ValueError, match="crosses the grid at 0 noise levels"):
        fit(cut(whole, 5), floor)
    with pytest.raises(ValueError, match="without noise there is no crossing"):
        fit(whole, cut(floor, 5))


def test_a_trial_of_the_table(tmp_path):
    words = "reproduce table regression --seeds 1 --processes 1 --shorten 100 --out"
    assert main([*words.split(), str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for wanted in ("mlp RandomNN", "(0.66)", "learning rates Adam 0.001", "shortened"):
        assert wanted in text
    for name in ("table", "regression"):
        assert (tmp_path / f"{name}.csv").is_file()
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'src="{name}.png"' in (tmp_path / "report.html").read_text()


def test_a_report_keeps_the_experiments_that_are_not_run_again(tmp_path):
    def section(title, note):
        return report.Section(
            title, ["One.", "Two."], ["a", ""], [["1", ""], ["2", "|w|"]], "f.png", [note]
        )

    first, second = section("2. Two: SGD", "old"), section("11. Eleven", "kept")
    report.write(tmp_path, [first, second])
    text = (tmp_path / "report.md").read_text()
    assert report.read(text) == [first, second]
    assert report.markdown(report.read(text)) == text
    report.write(tmp_path, [section("10. Ten", "new"), section("2. Two: SGD", "again")])
    found = report.read((tmp_path / "report.md").read_text())
    assert [(s.title, s.notes) for s in found] == [
        ("2. Two: SGD", ["again"]), ("10. Ten", ["new"]), ("11. Eleven", ["kept"]),
    ]  # fmt: skip
    assert (tmp_path / "report.html").read_text().count("<h2>") == 3
    committed = (Path(__file__).parents[2] / "bench/results/reproduce/report.md").read_text()
    assert report.markdown(report.read(committed)) == committed


def test_a_phase_diagram_of_a_known_boundary(tmp_path):
    """γ = 2e-5 + 250 σ² on the experiment's own grid; where no decay reaches it, no exponent."""
    for factor, wanted in ((250.0, "γ − γ₀ ∝ σ^2.0"), (1e6, "No exponent")):
        stored = {}
        for noise in (0.0, *phase_diagram.NOISES):
            decays = phase_diagram.DECAYS if noise else phase_diagram.FLOOR_DECAYS
            boundary = 2e-5 + factor * noise**2
            cosine = [[math.tanh(math.log(d / boundary) / 4)] * 2 for d in decays]
            arguments = {"noise": noise, "steps": 10}
            result = {"cosine": cosine, "weight_norm": cosine, "loss": cosine}
            stored[f"phase-{noise}"] = {"arguments": arguments, "result": result}
        section = phase_diagram.summarize(stored, tmp_path)
        assert wanted in section.text[0]
        assert len(section.rows) == len(phase_diagram.NOISES)
    assert (tmp_path / "phase.png").is_file()


def test_a_phase_cell():
    found = phase.cell("sgd", 0.1, 35, 1e-3, [0.0, 0.1], [0, 1])
    assert torch.tensor(found["cosine"]).shape == (2, 2)
    assert found["weight_norm"][1][0] < found["weight_norm"][0][0]


@pytest.mark.parametrize("rule", ["adam", "dfa", "random"])
def test_a_transformer_cell(rule):
    settings = {"lr": 1e-3, "steps": 4, "batch": 4, "examples": 8, "validation": 8, "every": 1}
    first = transformer_cells.cell(rule, 0.01, 0, measured=0.5, **settings)
    assert first == transformer_cells.cell(rule, 0.01, 0, measured=0.5, **settings)
    assert -1 <= first["cosine"] <= 1
    settled = transformer_cells.cell(rule, 0.01, 0, measured=0.5, settling=2, **settings)
    assert settled["weight_norm"] != first["weight_norm"]
    assert first["validation_variance"] > 0


def test_padding_takes_no_part_in_a_transformer_student():
    """Sequences of one length give the same with nothing behind them, and whatever is behind."""
    student = transformer_cells.draw_student(0)
    tokens = torch.randint(16, (6, 32))
    tokens[:, 5:] = transformer_cells.PADDING
    torch.testing.assert_close(student(tokens), student(tokens[:, :5]))
    with torch.no_grad():
        student.encode.tokens.weight[transformer_cells.PADDING] = 100.0
    torch.testing.assert_close(student(tokens), student(tokens[:, :5]))


def test_data_of_a_transformer_have_all_lengths():
    student = transformer_cells.draw_student(0)
    tokens, target = transformer_cells.draw_data(0, 640, student)
    lengths = (tokens != transformer_cells.PADDING).sum(1)
    assert lengths.unique().tolist() == list(range(1, 33))
    assert ((tokens == transformer_cells.PADDING).int().diff(dim=1) >= 0).all()
    torch.testing.assert_close(target[7:9], student(tokens[7:9]).detach())


@pytest.mark.parametrize("rule", ["adam", "random"])
def test_a_measurement_of_a_transformer_changes_nothing(rule):
    """And is the cosine of what one step would have learned from, by hand."""
    student = transformer_cells.draw_student(0)
    parameters = list(student.parameters())
    random = RandomNN(32, parameters, 0) if rule == "random" else None
    tokens, target = transformer_cells.draw_data(1, 16, transformer_cells.draw_student(1))
    before = [p.detach().clone() for p in parameters]
    loss, cosine = transformer_cells.measure(student, random, tokens, target)
    assert all(p.grad is None for p in parameters)
    assert all(map(torch.equal, parameters, before))
    assert float(transformer_cells.learn(student, random, tokens, target)[0]) == loss
    h_a = student.head[:2](student.encode(tokens)).detach()
    weight = student.second.weight
    direction = (h_a @ weight.detach().T).T @ h_a
    by_hand = torch.cosine_similarity(-weight.grad.flatten(), direction.flatten(), dim=0)
    assert cosine == pytest.approx(float(by_hand), abs=1e-5)


def test_the_whole_held_out_set_is_measured_in_one_batch():
    """With as many steps as it takes to measure once, beside a Monitor on the same network."""
    settings = sre.Students("sgd", 0.1, 10, 8, examples=16, validation=24, every=1, whole_every=9)
    found = sre.train(settings, [3], torch.tensor([0.1]))
    plain = dataclasses.replace(settings, steps=8, whole_every=None)
    kept = []

    def keep(stack, decay):
        kept.append(stack)
        return Learner(stack, "sgd", 0.1, decay, 3)

    assert "whole" not in sre.train(plain, [3], torch.tensor([0.1]), make=keep)
    x, y = sre.teach([3], 40)
    model = single(kept[0], 0)
    with Monitor(model) as monitor:
        (model(x[0, 16:]) - y[0, 16:]).square().mean().backward()
        assert found["whole"][0] == pytest.approx(
            monitor.report()["2"]["batch"]["cosine"], abs=1e-5
        )


def test_weights_that_are_gone_are_told_as_collapse(tmp_path):
    arguments = {"decay": 5e-3}
    result = {
        "cosine": [float("nan")], "validation_loss": [1.0], "validation_variance": [1.0],
        "weight_norm": [0.0], "initial_norm": [6.0], "whole": [0.9],
    }  # fmt: skip
    stored = {"table-mlp-adam-0.005": {"arguments": arguments, "result": result}}
    section = table.summarize(stored, tmp_path)
    assert section.rows[0][-1] == "collapse (collapse)"
    result["validation_loss"], result["cosine"] = [0.1], [0.5]
    found = table.summarize(stored, tmp_path)
    assert found.rows[0][-1] == "0.50 ± 0.00, 0.90 ± 0.00 (collapse)"


def test_sce_on_fashion_mnist(fashion_mnist):
    assert sce.find_data(fashion_mnist) == "fashion-mnist"
    planned = sce.cells(1, fashion_mnist, 50)
    assert [c.arguments["activation"] for c in planned] == ["linear", "relu", "tanh", "sigmoid"]
    x, classes, *_ = sce.load("fashion-mnist", fashion_mnist)
    assert x.shape == (60000, 784)
    assert math.isclose(float(x.min()), -1) and math.isclose(float(x.max()), 1)
    assert classes.unique().tolist() == list(range(10))


def test_cross_entropy_of_a_stack():
    output, classes = torch.randn(3, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    expected = [float(nn.functional.cross_entropy(o, classes)) for o in output]
    assert sce.cross_entropy(classes)(output).tolist() == pytest.approx(expected)


def test_a_trial_of_the_other_experiments(tmp_path, monkeypatch):
    monkeypatch.setattr(
        transformer_noise, "TRAININGS", ((5e-5, 8, 2000, 0), (5e-4, 16, 2000, 1000))
    )
    names = (
        "length-sgd length-dfa transformer-noise generalisation batch lr noise regularisers rules"
        " early neurons"
    )
    words = f"reproduce {names} --seeds 1 --transformer-seeds 1 --processes 1 --shorten 100"
    assert main([*words.split(), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for name in names.split():
        assert f"]({name}.png)" in text
        assert (tmp_path / f"{name}.csv").read_text().count("\n") > 1


def test_a_sweep_varies_what_it_says():
    """Held against single trainings of sre.py."""
    fixed = {"rule": "sgd", "lr": 0.1, "examples": 64, "validation": 8}
    stacked = sweep.cell("decay", [0.0, 0.5], [0], fixed, 40)
    for index, decay in enumerate((0.0, 0.5)):
        alone = sre.train(sre.Students(**fixed, steps=40), [0], torch.tensor([decay]))
        assert stacked["cosine"][index] == pytest.approx(alone["cosine"], abs=1e-5)
    assert stacked["weight_norm"][1][0] < 0.5 * stacked["weight_norm"][0][0]
    short = sweep.cell("steps", [35], [0], fixed, 40, base_decay=0.5)
    alone = sre.train(sre.Students(**fixed, steps=35), [0], torch.tensor([0.5]))
    assert short["cosine"][0] == pytest.approx(alone["cosine"], abs=1e-5)
    small, large = (sweep.cell("batch", [b], [0], fixed, 40)["cosine"] for b in (8.0, 64.0))
    assert small != large


@pytest.mark.parametrize("a", [0.0, 0.8])
def test_autocorrelation_time_of_a_known_process(a):
    """x' = a x + noise has (1 + a) / (1 − a)."""
    noise, x = np.random.default_rng(0).normal(size=40_000), np.zeros(40_000)
    for t in range(1, len(x)):
        x[t] = a * x[t - 1] + noise[t]
    time = dynamics.autocorrelation_time(x)
    assert time == pytest.approx((1 + a) / (1 - a), rel=0.1)
    assert math.isnan(dynamics.autocorrelation_time(np.ones(10)))


def test_series_start_at_the_first_step():
    """The first cosine is that of the initial weights, for the layer and its neurons."""
    layer, single_neurons = dynamics.series("relu", 2.0, 0.1, 3, 1)
    _, later = dynamics.series("relu", 2.0, 0.1, 2, 1, skip=1)
    torch.testing.assert_close(single_neurons[1:], later)
    model = rules.student(0)
    for index in (0, 2, 4):
        model[index].weight.data *= 2
    model[1] = model[3] = nn.ReLU()
    x, y = sre.teach([0], 20_000)
    rows = torch.randint(20_000, (64,), generator=torch.Generator().manual_seed(0))
    with Monitor(model) as monitor:
        (model(x[0, rows]) - y[0, rows]).square().mean().backward()
        found = monitor.report()["2"]["batch"]
    assert float(layer[0]) == pytest.approx(found["cosine"], abs=1e-5)
    torch.testing.assert_close(single_neurons[0, 0], found["neurons"], rtol=1e-4, atol=1e-5)


def test_students_as_modules_are_those_of_the_stack():
    model, stack = rules.student(5), Stack(sre.WIDTHS, [5], "tanh")
    x = torch.randn(1, 4, 32)
    torch.testing.assert_close(model(x[0]), stack.forward(x)[0][0])


def test_trainings_too_short_to_measure(tmp_path):
    with pytest.raises(ValueError, match="steps is 4, must be at least 35"):
        sre.Students("sgd", 0.1, steps=4)


def test_without_images_the_other_experiments_are_run(capsys):
    assert command.by_default(None) == [n for n in command.EXPERIMENTS if n != "sce"]
    assert capsys.readouterr().out == "left out, for want of --root: sce\n"
    assert command.by_default("somewhere") == list(command.EXPERIMENTS)


def test_bad_words(tmp_path, capsys):
    assert list(options.EXPERIMENTS) == list(command.EXPERIMENTS)
    for words, message in (
        (["tabel"], "EXPERIMENT is 'tabel', must be one of sce, table"),
        (["table", "--seeds", "0"], "--seeds 0: expected an integer of at least 1"),
        (["table", "--shorten", "101"], "--shorten 101: expected an integer of at least 1 and be"),
        (["sce"], "--root: expected the directory of CIFAR-10 or Fashion-MNIST"),
        (["sce", "--root", "/no"], "--root /no: expected"),
    ):
        assert main(["reproduce", *words, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
