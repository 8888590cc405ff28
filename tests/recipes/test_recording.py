"""`ghl train --align-every`: what is recorded, that training does not see it, kills and resumes."""

import errno
import json
import os
from functools import partial

import pytest
import torch
import torchvision
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models import ResNet, VisionTransformer
from torchvision.models.resnet import Bottleneck

from ghl.alignment import sinks
from ghl.alignment.sinks import read_csv
from ghl.cli import main
from ghl.recipes import recording
from ghl.recipes.config import Config
from ghl.recipes.recording import recorded
from ghl.recipes.train import Run, open_run, train
from ghl.recipes.trainer import Trainer

SMALL = {
    "width": 0.02, "epochs": 2, "batch_size": 32, "limit_train": 160, "limit_test": 16,
    "momentum": 0.9, "accumulate": 2, "ema": 0.9, "device": "cpu",
}  # fmt: skip
LAYERS = ["conv1", "conv2", "conv3", "classifier"]


def words(settings):
    return [w for name, v in settings.items() for w in ("--" + name.replace("_", "-"), str(v))]


def command(out, *more, **settings):
    return main(["train", "--out", str(out), *words(SMALL | settings), *more])


def state(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def alignment(out):
    return read_csv(out / "alignment.csv")


@pytest.mark.parametrize("rule", ["bp", "ghl"])
def test_training_is_bit_identical_and_every_layer_recorded(tmp_path, rule):
    assert command(tmp_path / "plain", rule=rule, epochs=1) == 0
    assert command(tmp_path / "seen", "--align-neurons", rule=rule, epochs=1, align_every=3) == 0
    plain, seen = state(tmp_path / "plain"), state(tmp_path / "seen")
    for part in ("model", "average", "optimizer"):
        torch.testing.assert_close(seen[part], plain[part], rtol=0, atol=0)
    assert torch.equal(plain["ranks"][0]["random"]["torch"], seen["ranks"][0]["random"]["torch"])
    rows = alignment(tmp_path / "seen")
    assert [(int(r["step"]), r["layer"]) for r in rows] == [
        (step, layer) for step in (0, 3) for layer in LAYERS
    ]
    for row in rows:
        assert -1 <= float(row["batch_cosine"]) <= 1
        assert -1 <= float(row["update_cosine"]) <= 1
        assert (row["sample_cosine"] == "") == (rule == "ghl" and row["layer"] != "classifier")
    assert len(list((tmp_path / "seen" / "tensorboard" / "alignment").iterdir())) == 1
    assert main(["align", str(tmp_path / "seen")]) == 0
    assert (tmp_path / "seen" / "neurons.png").is_file()
    assert not list((tmp_path / "plain").glob("align*"))


@pytest.mark.parametrize("rule", ["bp", "ghl"])
def test_measured_steps_of_a_compiled_network(tmp_path, monkeypatch, rule):
    """They run eagerly: what is recorded is that of a network which is not compiled."""
    assert command(tmp_path / "eager", rule=rule, epochs=1, align_every=2) == 0
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    assert command(tmp_path / "seen", "--compile", rule=rule, epochs=1, align_every=2) == 0
    assert counter.frame_count > 0, "the other steps were not compiled"
    rows, others = alignment(tmp_path / "seen"), alignment(tmp_path / "eager")
    assert [(int(row["step"]), row["layer"]) for row in rows] == [
        (step, layer) for step in (0, 2, 4) for layer in LAYERS
    ]
    for row, other in zip(rows, others, strict=True):
        assert row["gaps"] == other["gaps"]
        for part in ("batch_cosine", "update_cosine"):
            assert float(row[part]) == pytest.approx(float(other[part]), abs=0.02)


def test_without_the_option_there_is_no_monitor(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a Monitor was made")

    monkeypatch.setattr(recording, "Monitor", refuse)
    train(Run(tmp_path, Config.resolve(SMALL)))
    with pytest.raises(AssertionError, match="a Monitor was made"):
        train(Run(tmp_path / "seen", Config.resolve(SMALL | {"align_every": 5})))


@pytest.mark.parametrize("stop", [5, 7])
def test_an_interrupted_run_records_what_an_uninterrupted_one_does(tmp_path, monkeypatch, stop):
    """Stopped after its checkpoints of steps 4 and 6; 6 is measured, and has no step before it."""
    settings = SMALL | {"rule": "bp", "align_every": 3, "checkpoint_every": 2}
    train(Run(tmp_path / "whole", Config.resolve(settings)))
    step, calls = torch.optim.SGD.step, 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        train(Run(tmp_path / "cut", Config.resolve(settings)))
    monkeypatch.undo()
    train(open_run(tmp_path / "cut", {}, resume=True))
    torch.testing.assert_close(
        state(tmp_path / "cut")["model"], state(tmp_path / "whole")["model"], rtol=0, atol=0
    )
    found, expected = alignment(tmp_path / "cut"), alignment(tmp_path / "whole")
    lost = [row for row in found if stop == 7 and row["step"] == "6"]
    for row, other in zip(found, expected, strict=True):
        if row in lost:
            assert row.pop("sign_flips") == "" and "step before" in row.pop("gaps")
            del other["sign_flips"], other["gaps"]
        assert row == other


def test_it_may_begin_when_a_run_is_resumed(tmp_path):
    train(Run(tmp_path, Config.resolve(SMALL | {"epochs": 1})))
    settings = json.loads((tmp_path / "config.json").read_text()) | {"epochs": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    train(open_run(tmp_path, {"align_every": 4}, resume=True))
    assert sorted({int(row["step"]) for row in alignment(tmp_path)}) == [8]


def test_a_full_disk_ends_the_recording_and_not_the_run(tmp_path, monkeypatch, capsys):
    write, count = sinks.write_rows, 0

    def full(file, lines):
        nonlocal count
        count += 1
        if count > 2:
            file.write("half a ro")
            file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, lines)

    monkeypatch.setattr(sinks, "write_rows", full)
    settings = SMALL | {"align_every": 1, "epochs": 1}
    train(Run(tmp_path, Config.resolve(settings)))
    printed = capsys.readouterr().out
    assert printed.count("alignment is not recorded any more") == 1
    assert {row["step"] for row in alignment(tmp_path)} == {"0"}
    assert state(tmp_path)["epoch"] == 1


def inner_products(tmp_path, scale):
    """Of the first step with this initial scale of the loss, and how many steps were measured."""
    config = Config.resolve(SMALL | {"rule": "bp", "epochs": 1, "amp": "fp16", "align_every": 1})
    trainer, out = Trainer(config), tmp_path / str(scale)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with recorded(trainer, out):
        trainer.train_epoch()
    return alignment(out)


def test_a_scaled_loss(tmp_path):
    """Inner products are those of the loss itself; a step that is left out is told as a gap."""
    one, other = (inner_products(tmp_path, 2.0**power) for power in (4, 8))
    for row, same in zip(one[: len(LAYERS)], other, strict=False):
        for part in ("batch_inner", "sample_inner"):
            assert float(row[part]) == pytest.approx(float(same[part]), rel=0.02)
    skipped = inner_products(tmp_path, 2.0**60)
    assert [int(row["step"]) for row in skipped[:: len(LAYERS)]] == [0, 1, 2, 3, 4]
    assert skipped[3]["batch_cosine"] == "" and "NaN or infinity" in skipped[3]["gaps"]


def small_network(name, weights, **options):
    """resnet50 and vit_b_16 as torchvision builds them, at a hundredth of their size."""
    classes = options["num_classes"]
    if name == "resnet50":
        return ResNet(Bottleneck, [1, 1, 1, 1], classes, width_per_group=4)
    return VisionTransformer(options["image_size"], 16, 2, 2, 32, 64, num_classes=classes)


@pytest.mark.parametrize(
    ("arch", "last"),
    [("resnet50", "fc"), ("vit_b_16", "encoder.layers.encoder_layer_1.self_attention.in_proj")],
)
def test_the_recipe_for_full_size(tmp_path, monkeypatch, arch, last):
    """The README's command on smaller networks and images: each layer has numbers, not gaps."""
    monkeypatch.setattr(torchvision.models, "get_model", small_network)
    settings = {"arch": arch, "data": "fake", "size": 32, "rule": "bp", "width": 1.0, "epochs": 1}
    settings |= {"batch_size": 4, "limit_train": 12, "limit_test": 2, "lr": 1e-3, "lr_hebb": 1e-3}
    assert command(tmp_path, amp="bf16", warmup=0, align_every=2, **settings) == 0
    rows = alignment(tmp_path)
    assert last in [row["layer"] for row in rows]
    assert {row["step"] for row in rows} == {"0", "2"}
    for row in rows:
        if row["step"] == "2":  # at the first, a ViT's head of zeros lets no gradient pass
            for part in ("batch", "sample", "update"):
                assert -1 <= float(row[f"{part}_cosine"]) <= 1, row


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--align-every", "0"], "--align-every 0: expected an integer of at least 1"),
        (["--align-every", "-3"], "--align-every -3: expected an integer of at least 1"),
        (["--align-neurons"], "--align-neurons: expected with --align-every"),
        (["--align-every", "5", "--fsdp"], "--align-every 5: expected without --fsdp"),
    ],
)
def test_bad_words(tmp_path, capsys, more, message):
    assert main(["train", "--out", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
