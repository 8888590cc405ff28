"""What the options of large runs do to a small one."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from recipes.photographs import CLASSES, write_folders, write_shards
from torch.distributed import destroy_process_group, init_process_group
from torch.utils.data import DataLoader

from ghl.layers import Plastic
from ghl.recipes.config import Config
from ghl.recipes.ema import Average
from ghl.recipes.loader import TooManyDamaged
from ghl.recipes.train import Run, open_run, train
from ghl.recipes.trainer import Trainer

NARROW = {"arch": "resnet20", "width": 0.25, "epochs": 1, "limit_train": 96, "batch_size": 32}


def trained(**settings):
    """A trainer after one epoch of three steps, and the loss of that epoch."""
    trainer = Trainer(Config.resolve(NARROW | {"device": "cpu"} | settings))
    return trainer, trainer.train_epoch()[0]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module")
def plain():
    """What the same run gives without options."""
    return trained()


@pytest.mark.parametrize(("amp", "rule"), [("bf16", "ghl"), ("fp16", "ghl"), ("fp16", "bp")])
def test_amp_is_the_same_run_in_fewer_bits(plain, amp, rule):
    trainer, loss = trained(amp=amp, rule=rule)
    assert loss == pytest.approx(plain[1] if rule == "ghl" else trained(rule=rule)[1], rel=0.02)
    assert trainer.model.conv1.weight.dtype == torch.float32
    outputs = []
    trainer.model.classifier.register_forward_hook(lambda *args: outputs.append(args[-1]))
    test_loss = trainer.evaluate()[0]
    logits = torch.cat(outputs)
    assert logits.dtype == (torch.bfloat16 if amp == "bf16" else torch.float16)
    classes = torch.cat([classes for _, classes in trainer.test_loader])
    expected = torch.nn.functional.cross_entropy(logits.float(), classes).item()
    assert test_loss == pytest.approx(expected, rel=1e-6)
    assert trainer.scaler.is_enabled() == (amp == "fp16")
    assert (trainer.synchronized is not None) == (amp == "fp16" and rule == "ghl")


@pytest.mark.parametrize("options", [{}, {"fused": True, "momentum": 0.9}])
def test_fp16_overflow_skips_the_step(options):
    trainer = Trainer(Config.resolve(NARROW | {"device": "cpu", "amp": "fp16"} | options))
    before, scale = weights(trainer), 2.0**100
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": scale})
    trainer.train_epoch()
    assert torch.equal(weights(trainer), before)
    assert trainer.state()["scaler"]["scale"] == scale / 2**3
    assert not any(kept["momentum_buffer"].any() for kept in trainer.optimizer.state.values())


@pytest.mark.parametrize("options", [{"channels_last": True}, {"fused": True}])
def test_the_same_numbers_another_way(plain, options):
    trainer, loss = trained(**options)
    assert loss == pytest.approx(plain[1], rel=1e-3)
    weight = trainer.model.stage1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in options)
    assert bool(trainer.optimizer.defaults["fused"]) == ("fused" in options)


@pytest.mark.parametrize(
    ("options", "swapped"),
    [
        ({}, {"Conv2d"}),
        ({"layers": "linear"}, {"Linear"}),
        ({"layers": "linear", "arch": "deephebb", "width": 0.05}, {"Linear"}),
        ({"layers": "all"}, {"Conv2d", "Linear"}),
        ({"layers": "all", "exclude": ["stage*"]}, {"conv1", "classifier"}),
        ({"layers": "all", "exclude": ["stage*", "conv1"]}, {"classifier"}),
    ],
)
def test_the_rule_trains_the_layers_asked_for(options, swapped):
    trainer = Trainer(Config.resolve(NARROW | {"device": "cpu"} | options))
    plastic = {n: m for n, m in trainer.model.named_modules() if isinstance(m, Plastic)}
    assert swapped in ({type(m).__name__ for m in plastic.values()}, plastic.keys())


def test_compiled_is_the_same_run():
    settings = {"arch": "deephebb", "width": 0.05, "limit_train": 64}
    compiled, loss = trained(**settings, compile=True)
    assert compiled.model._compiled_call_impl is not None
    _, expected = trained(**settings)
    assert loss == pytest.approx(expected, rel=0.05)  # dropout draws other numbers there
    begin = Trainer(Config.resolve(NARROW | {"device": "cpu"} | settings))
    assert not torch.equal(compiled.model.conv1.weight, begin.model.conv1.weight)


def test_shards_are_compiled_one_by_one(tmp_path, monkeypatch):
    """Each in one graph, in training and in evaluation, however many there are."""
    settings = {"arch": "deephebb", "width": 0.05, "limit_train": 64, "limit_test": 8}
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
            compiled, loss = trained(**settings, compile=True, fsdp=True)
            compiled.evaluate()
        found = torch._dynamo.utils.counters
    finally:
        destroy_process_group()
    parts = sum(any(True for _ in child.parameters()) for child in compiled.model.children())
    assert found["stats"]["unique_graphs"] == 2 * parts == 8
    assert not found["graph_break"]
    _, expected = trained(**settings)
    assert loss == pytest.approx(expected, rel=0.05)  # as above


def test_channels_last_images_reach_the_network():
    trainer = Trainer(Config.resolve({"data": "fake", "arch": "resnet18", "size": 32,
                                      "limit_train": 4, "limit_test": 2, "batch_size": 2,
                                      "channels_last": True, "device": "cpu"}))  # fmt: skip
    for images, _ in trainer.test_loader:
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert not images.is_contiguous()


def test_accumulation_is_the_same_step():
    """Without batch statistics, that is: here in a network that has none."""
    trainers = [
        Trainer(Config.resolve(NARROW | {"device": "cpu", "accumulate": n, "rule": rule}))
        for rule in ("ghl", "bp")
        for n in (1, 3)
    ]
    for trainer in trainers:
        for name, module in list(trainer.model.named_modules()):
            if isinstance(module, torch.nn.BatchNorm2d):
                trainer.model.set_submodule(name, torch.nn.Identity())
    for one, cut in (trainers[:2], trainers[2:]):
        begin = one.model.conv1.weight.detach().clone()
        for trainer in (one, cut):
            batches = iter(trainer.train_loader)
            trainer.model.train()
            trainer._train_step(batches, 32)
        moved = (one.model.conv1.weight - begin).abs().max()
        apart = (one.model.conv1.weight - cut.model.conv1.weight).abs().max()
        assert 0 < apart < 1e-4 * moved


def test_accumulation_leaves_out_no_small_last_step():
    """Of three images, where a full step's are cut into four."""
    trainer, _ = trained(limit_train=35, batch_size=16, accumulate=4)
    assert (trainer.totals.count, trainer.schedule.last_epoch) == (35, 3)


def test_the_rate_falls_over_the_steps_of_this_run():
    """Also where the run went on from one of other processes, whose epochs had others."""
    settings = Config.resolve(NARROW | {"device": "cpu", "epochs": 2})
    trainer, other = Trainer(settings), Trainer(settings)
    steps = trainer.schedule.lr_lambdas[0].steps
    other.schedule.lr_lambdas[0].steps = steps // 2
    trainer.restore(other.state())
    assert trainer.schedule.lr_lambdas[0].steps == steps


def test_label_smoothing_is_in_the_training_loss_alone(plain):
    trainer, loss = trained(label_smoothing=0.5, lr=1e-9, lr_hebb=1e-9)
    same, sharp = trained(lr=1e-9, lr_hebb=1e-9)
    assert loss != pytest.approx(sharp, rel=1e-3)
    assert trainer.evaluate()[0] == pytest.approx(same.evaluate()[0], rel=1e-5)


def test_momentum_and_warm_up_reach_the_optimizer():
    trainer, _ = trained(momentum=0.5, epochs=4, warmup=1, lr=1.0)
    assert len(trainer.optimizer.state) > 0
    assert trainer.lr == 1.0  # after the epoch that warms up
    fresh = Trainer(Config.resolve(NARROW | {"device": "cpu", "epochs": 4, "warmup": 1, "lr": 1.0}))
    assert fresh.lr == 0.25


def test_adamw_has_settings_of_its_own():
    """Beside those that are given, for the layers of a rule too."""
    trainer, loss = trained(optimizer="adamw", lr_hebb=1e-3, epochs=2)
    assert type(trainer.optimizer) is torch.optim.AdamW and math.isfinite(loss)
    groups = {g["lr"] / trainer.optimizer.defaults["lr"]: g for g in trainer.optimizer.param_groups}
    assert trainer.optimizer.defaults["lr"] == 3e-3
    assert {g["initial_lr"] for g in groups.values()} == {3e-3, 1e-3}
    assert {g["weight_decay"] for g in groups.values()} == {0.3}
    assert Config.resolve({"optimizer": "sgd"}) == Config.resolve({})


def test_average_of_parameters():
    model = torch.nn.Linear(1, 1, bias=False)
    average = Average(model, decay=0.5)
    start, steps = model.weight.item(), []
    for n in range(1, 4):
        torch.nn.init.constant_(model.weight, n)
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        start = decay * start + (1 - decay) * n
        steps.append(start)
    with average.applied():
        assert model.weight.item() == pytest.approx(steps[-1])
    assert model.weight.item() == 3


def test_evaluation_is_of_the_average():
    trainer, _ = trained(ema=0.9)
    averaged = trainer.evaluate()
    with trainer.average.applied():
        trainer.average = None
        assert trainer.evaluate() == averaged
    assert trainer.evaluate() != averaged


PHOTOGRAPHS = {
    "data": "imagenet",
    "arch": "resnet20",
    "width": 0.25,
    "size": 32,
    "resize_from": 16,
    "epochs": 3,
    "batch_size": 4,
    "checkpoint_every": 2,
    "damaged_share": 0.2,
    "device": "cpu",
}


class Killed(Exception):
    """What ends a run in a test."""


def kill():
    raise Killed


def test_photographs_resume_within_an_epoch(tmp_path, monkeypatch):
    """From shards, with worker processes, growing images and one that is damaged."""
    write_shards(tmp_path / "shards", images=6)
    settings = PHOTOGRAPHS | {"root": str(tmp_path / "shards"), "workers": 1}
    train(Run(tmp_path / "whole", Config.resolve(settings)))

    step, calls = torch.optim.SGD.step, 0

    def cut_off(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 6:
            kill()
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.SGD, "step", cut_off)
        train(Run(tmp_path / "cut", Config.resolve(settings)))
    train(open_run(tmp_path / "cut", {}, resume=True))
    one, two = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "cut")
    )
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    losses = [[row["train_loss"] for row in state["history"]] for state in (one, two)]
    assert losses[0] == losses[1]


def test_other_photographs_are_refused_when_a_run_resumes(tmp_path):
    for name, images in (("some", 2), ("more", 3), ("renamed", 2), ("others", 2)):
        write_folders(tmp_path / name, images=images)
    first = next((tmp_path / "others" / "train").rglob("*.*"))
    first.rename(first.with_stem("another"))
    for split in ("train", "val"):
        (tmp_path / "renamed" / split / CLASSES[1]).rename(tmp_path / "renamed" / split / "other")
    settings = PHOTOGRAPHS | {"root": str(tmp_path / "some"), "epochs": 1}
    train(Run(tmp_path / "run", Config.resolve(settings)))
    found = {"more": "6 of 2 classes", "renamed": f"4 .*not in both: {CLASSES[1]}, other"}
    found["others"] = "4 of 2 classes of other names, or in another order"
    for name, message in found.items():
        run = open_run(tmp_path / "run", {"root": str(tmp_path / name)}, resume=True)
        with pytest.raises(ValueError, match=f"--root .*{name}: expected .*4 .*found {message}"):
            train(run)
    (tmp_path / "some").rename(tmp_path / "moved")
    train(open_run(tmp_path / "run", {"root": str(tmp_path / "moved")}, resume=True))


def test_damaged_images_are_counted_over_an_interruption(tmp_path):
    """Each once, also where the photographs lie elsewhere afterwards."""
    write_folders(tmp_path / "here", images=4)
    settings = PHOTOGRAPHS | {"arch": "deephebb", "width": 0.05, "resize_from": None}
    settings |= {"root": str(tmp_path / "here"), "damaged_share": 0.3}
    cut, other = (Trainer(Config.resolve(settings)) for _ in range(2))
    order = {"batch_sampler": other.order, "generator": other.generator}
    one_a_step = {numbers[0] for numbers in DataLoader(range(8), **order, collate_fn=list)}
    for number in one_a_step:
        Path(cut.train_loader.photographs.files.name(number)).write_bytes(b"")
    with pytest.raises(Killed):
        cut.train_epoch(after_step=kill)
    state = cut.state()
    (rank,) = state["ranks"]
    (tmp_path / "here").rename(tmp_path / "there")
    settings["root"] = str(tmp_path / "there")

    resumed = Trainer(Config.resolve(settings))
    resumed.restore(state)
    for _ in range(2):
        resumed.train_epoch()
    assert resumed.train_loader.damage.found.keys() == one_a_step

    resumed = Trainer(Config.resolve(settings | {"damaged_share": 0.2}))
    resumed.restore(state | {"ranks": [rank | {"damaged": {}}, rank]})  # of two processes
    with pytest.raises(TooManyDamaged, match=f"found 2 .{tmp_path}/here"):
        resumed.train_epoch()


def test_images_grow(tmp_path):
    write_folders(tmp_path)
    trainer = Trainer(Config.resolve(PHOTOGRAPHS | {"root": str(tmp_path), "epochs": 5}))
    sides = []
    trainer.model.register_forward_pre_hook(
        lambda module, args: sides.append(args[0].shape[-1]) if module.training else None
    )
    for _ in range(5):
        trainer.train_epoch()
        trainer.evaluate()
    assert sides == [16, 16, 24, 32, 32]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"batch_size": 1}, "found 0 "),
        ({"arch": "fasthebb", "width": 0.1}, "found 1 .* no variance of one value"),
        ({"arch": "fasthebb", "width": 0.1, "compile": True}, "found 1 .* no variance"),
    ],
    ids=["none", "one", "one, compiled"],
)
def test_too_few_intact_images_in_a_micro_batch_stop_the_run(tmp_path, settings, found):
    write_folders(tmp_path, images=1)
    (tmp_path / "train" / "ant" / "000.jpg").write_bytes(b"")
    settings = (
        PHOTOGRAPHS | {"root": str(tmp_path), "damaged_share": 0.5, "resize_from": None} | settings
    )
    with pytest.raises(ValueError, match=f"expected more intact images .*, {found}"):
        Trainer(Config.resolve(settings)).train_epoch()


def test_decoding_on_the_device_trains(tmp_path):
    write_folders(tmp_path, images=4)
    settings = PHOTOGRAPHS | {"root": str(tmp_path), "decode": "device", "epochs": 1}
    trainer = Trainer(Config.resolve(settings))
    assert math.isfinite(trainer.train_epoch()[0])
    assert trainer.train_loader.photographs.encoded
    assert trainer.totals.count == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amp": "fp8"}, "--amp is 'fp8', must be one of none, bf16, fp16"),
        ({"decode": "gpu"}, "--decode is 'gpu', must be one of auto, workers, device"),
        ({"world_change": "ignore"}, "--world-change is 'ignore', must be one of refuse, rescale"),
        ({"ema": 1.0}, "--ema 1.0: expected a finite number of at least 0 and below 1"),
        ({"optimizer": "lion"}, "--optimizer is 'lion', must be one of sgd, adamw"),
        ({"optimizer": "adamw", "momentum": 0.9}, "--momentum 0.9: expected with --optimizer sgd"),
        ({"momentum": -0.1}, "--momentum -0.1: expected a finite number of at least 0"),
        ({"label_smoothing": math.nan}, "--label-smoothing nan: expected a finite number"),
        ({"damaged_share": 2}, "--damaged-share 2: expected .* below 1"),
        ({"fused": True, "fsdp": True}, "--fused: expected without --fsdp or with .* adamw"),
        ({"layers": "conv1d"}, "--layers is 'conv1d', must be one of .*; did you mean 'conv2d'"),
        ({"accumulate": 0}, "--accumulate 0: expected an integer of at least 1"),
        ({"checkpoint_every": 0}, "--checkpoint-every 0: expected an integer of at least 1"),
        ({"warmup": 5, "epochs": 5}, "--warmup 5: expected fewer than --epochs 5"),
        ({"resize_from": 16}, "--resize-from 16: expected photographs, .* not --data digits"),
        ({"data": "fake", "resize_from": 300}, "--resize-from 300: expected at most --size 224"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Config.resolve(settings)


def test_a_network_must_take_the_first_size(tmp_path):
    write_folders(tmp_path)
    settings = {"data": "imagenet", "root": str(tmp_path), "arch": "vgg11", "device": "cpu"}
    settings |= {"size": 64, "resize_from": 8}
    with pytest.raises(ValueError, match=r"--resize-from 8: .*vgg11"):
        Trainer(Config.resolve(settings))
