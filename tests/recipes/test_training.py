"""Training runs: what they learn, write and refuse."""

import csv

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ghl.recipes.config import Config
from ghl.recipes.train import Run, evaluate, open_run, train
from ghl.recipes.trainer import Diverged, Trainer


def weights(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)["model"]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_leaves_everything_behind(tmp_path, small, capsys):
    rows = train(Run(tmp_path / "run", Config.resolve(small)))
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"config.json", "metrics.csv", "checkpoint.pt", "curves.png", "tensorboard"}
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")

    with (tmp_path / "run" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    header = ["epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds"]
    header += ["images_per_second", "waiting"]
    assert list(table[0]) == header
    assert [int(row["epoch"]) for row in table] == [1, 2, 3]
    assert [float(row["test_loss"]) for row in table] == [row.test_loss for row in rows]
    assert 0 <= rows[-1].test_acc <= 100
    assert all(row.images_per_second > 0 and 0 < row.waiting < 100 for row in rows)

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("test/acc")] == [1, 2, 3]
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.split()[0] in "123" for line in printed) == 3


def test_eval_gives_the_last_row(tmp_path, small):
    rows = train(Run(tmp_path, Config.resolve(small)))
    assert evaluate(tmp_path, {}) == (3, rows[-1].test_loss, rows[-1].test_acc)


@pytest.mark.parametrize("rule", ["ghl", "hebb", "sign", "bp"])
def test_every_rule_learns_digits(rule):
    """Chance is 10 %; Hebbian learning alone leaves the classifier to do most of the work."""
    trainer = Trainer(Config.resolve({"rule": rule, "width": 0.125, "epochs": 3, "device": "cpu"}))
    first = trainer.model.conv2.weight.detach().clone()
    for _ in range(3):
        trainer.train_epoch()
    assert trainer.evaluate()[1] > (65 if rule == "hebb" else 85)
    assert not torch.equal(trainer.model.conv2.weight, first)


def test_rules_differ_from_the_same_start(small):
    trained = {}
    for rule in ("ghl", "bp"):
        trainer = Trainer(Config.resolve(small | {"rule": rule, "lr": 0.01, "lr_hebb": 0.01}))
        trained[rule, "before"] = trainer.model.conv1.weight.detach().clone()
        trainer.train_epoch()
        trained[rule, "after"] = trainer.model.conv1.weight.detach().clone()
    assert torch.equal(trained["ghl", "before"], trained["bp", "before"])
    assert not torch.equal(trained["ghl", "after"], trained["bp", "after"])


def test_tau_and_normalize_reach_the_layers(small):
    trainer = Trainer(Config.resolve(small))
    taus = [rule.tau for rule in trainer.swapped.swapped.values()]
    assert taus == [1 / 1.0, 1 / 0.65, 1 / 0.25]
    trainer = Trainer(Config.resolve(small | {"tau": 3.0, "normalize": "mean"}))
    rules = trainer.swapped.swapped.values()
    assert {(rule.tau, rule.normalize) for rule in rules} == {(3.0, "mean")}


def test_optimizer_groups_have_their_own_settings(small):
    settings = {"lr": 0.1, "lr_hebb": 0.2, "wd": 0.3, "wd_hebb": 0.4}
    trainer = Trainer(Config.resolve(small | settings))
    groups = {
        (group["initial_lr"], group["weight_decay"]): sum(p.numel() for p in group["params"])
        for group in trainer.optimizer.param_groups
    }
    convolutions = sum(getattr(trainer.model, f"conv{i}").weight.numel() for i in (1, 2, 3))
    rest = sum(p.numel() for p in trainer.model.classifier.parameters())
    assert groups == {(0.2, 0.4): convolutions, (0.1, 0.3): rest}


def test_schedule_goes_to_zero_by_steps(small):
    trainer = Trainer(Config.resolve(small | {"lr": 1.0}))
    for _ in range(3):
        trainer.train_epoch()
        last = trainer.lr
    assert last == pytest.approx(0, abs=1e-12)
    constant = Trainer(Config.resolve(small | {"lr": 1.0, "schedule": "constant"}))
    constant.train_epoch()
    assert constant.lr == 1.0


def test_a_seed_decides_everything(tmp_path, small):
    for name, seed, workers in (("a", 1, 0), ("b", 1, 1), ("c", 2, 0)):
        settings = {"epochs": 1, "seed": seed, "workers": workers}
        train(Run(tmp_path / name, Config.resolve(small | settings)))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_last_batch_of_one_is_left_out(small):
    trainer = Trainer(Config.resolve(small | {"limit_train": 65, "arch": "fasthebb"}))
    assert len(trainer.train_loader) == 1
    trainer.train_epoch()


def test_a_directory_with_a_run_is_refused(tmp_path, small):
    train(Run(tmp_path, Config.resolve(small | {"epochs": 1})))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match=f"--out {tmp_path}: .*--resume"):
        open_run(tmp_path, small, resume=False)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_file_in_the_way_is_refused(tmp_path, small):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="expected a directory, found a file"):
        open_run(tmp_path / "file", small, resume=False)


def test_a_finished_run_resumes_to_itself(tmp_path, small):
    rows = train(Run(tmp_path, Config.resolve(small)))
    before = weights(tmp_path)
    assert train(open_run(tmp_path, {}, resume=True)) == rows
    assert same(weights(tmp_path), before)


def test_a_checkpoint_of_another_width_is_refused(tmp_path, small):
    train(Run(tmp_path / "a", Config.resolve(small | {"epochs": 1})))
    train(Run(tmp_path / "b", Config.resolve(small | {"epochs": 1, "width": 0.1})))
    (tmp_path / "b" / "checkpoint.pt").replace(tmp_path / "a" / "checkpoint.pt")
    with pytest.raises(ValueError, match="expected the weights of deephebb"):
        evaluate(tmp_path / "a", {})


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, small, monkeypatch):
    steps = 0

    def cross_entropy(outputs, classes):
        nonlocal steps
        steps += outputs.requires_grad
        return F.nll_loss(outputs.log_softmax(1), classes) * (float("nan") if steps > 4 else 1)

    monkeypatch.setattr("ghl.recipes.trainer.F.cross_entropy", cross_entropy)
    message = r"epoch 3 of .*: training loss nan: .*--lr.*keeps epoch 2"
    with pytest.raises(Diverged, match=message):
        train(Run(tmp_path, Config.resolve(small)))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("bad", [7, 8])
def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path, small, monkeypatch, bad):
    """Of the second epoch's four steps, the last but one or the last."""
    step, calls = torch.optim.SGD.step, 0

    def poisoned(optimizer, *args, **kwargs):
        nonlocal calls
        calls += 1
        step(optimizer, *args, **kwargs)
        if calls == bad:
            optimizer.param_groups[-1]["params"][-1].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.SGD, "step", poisoned)
    message = rf"epoch 2 of .*: weights: .*keeps epoch 1 and {bad - 5} steps"
    with pytest.raises(Diverged, match=message):
        train(Run(tmp_path, Config.resolve(small | {"limit_train": 256, "checkpoint_every": 1})))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, bad - 5)
    assert all(value.isfinite().all() for value in state["model"].values())


def test_fashion_mnist_trains(tmp_path, small, fashion_mnist):
    settings = {"data": "fashion-mnist", "root": fashion_mnist, "limit_train": 640, "epochs": 1}
    rows = train(Run(tmp_path, Config.resolve(small | settings)))
    assert rows[0].test_acc > 20
