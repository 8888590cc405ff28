"""The settings: published defaults, validation, config.json."""

import json
import math

import pytest
import torch

from ghl.recipes.config import Config


def test_defaults_are_the_published_ones():
    config = Config.resolve({})
    assert (config.rule, config.arch, config.data) == ("ghl", "deephebb", "digits")
    assert (config.lr, config.lr_hebb, config.wd, config.wd_hebb) == (5e-3, 1e-2, 0, 5e-2)
    assert (config.epochs, config.batch_size, config.schedule) == (100, 64, "cosine")
    assert config.tau == {"conv1": 1 / 1.0, "conv2": 1 / 0.65, "conv3": 1 / 0.25}
    fast = Config.resolve({"arch": "fasthebb"})
    assert (fast.lr, fast.lr_hebb, fast.wd, fast.wd_hebb, fast.tau) == (1e-4, 5e-2, 0, 1e-2, 1.0)


def test_what_is_given_wins_over_every_default():
    given = {"rule": "bp", "lr": 0.25, "lr_hebb": 0.125, "tau": 2.0, "size": 16, "epochs": 7}
    config = Config.resolve(given)
    assert {name: getattr(config, name) for name in given} == given


def test_images_are_as_large_as_data_or_network_need():
    assert Config.resolve({}).size == 8
    assert Config.resolve({"arch": "fasthebb"}).size == 24
    assert Config.resolve({"arch": "fasthebb", "data": "cifar10"}).size == 32


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
@pytest.mark.parametrize("field", ["tau", "width", "lr", "lr_hebb"])
def test_numbers_above_zero(field, value):
    option = "--" + field.replace("_", "-")
    with pytest.raises(ValueError, match=f"{option} {value}: expected a finite number above 0"):
        Config.resolve({field: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9])
@pytest.mark.parametrize("field", ["wd", "wd_hebb"])
def test_weight_decay_may_be_zero(field, value):
    assert getattr(Config.resolve({field: 0.0}), field) == 0
    with pytest.raises(ValueError, match=r"--wd.*: expected a finite number of at least 0"):
        Config.resolve({field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("size", -3),
        ("seed", -1),
        ("workers", -1),
        ("limit_train", 0),
        ("limit_test", -1),
        ("epochs", 1.5),
    ],
)
def test_integers(field, value):
    option = "--" + field.replace("_", "-")
    with pytest.raises(ValueError, match=f"{option} {value}: expected an integer of at least"):
        Config.resolve({field: value})


def test_a_seed_leaves_room_for_ranks():
    """Each process seeds generators of 64 bits with it, and 2**32 times its rank more."""
    torch.manual_seed(Config.resolve({"seed": 2**63 - 1}).seed + (2**31 - 1) * 2**32)
    with pytest.raises(ValueError, match=f"--seed {2**63}: .* at least 0 and below {2**63}"):
        Config.resolve({"seed": 2**63})


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("rule", "gll", "'ghl'"),
        ("arch", "DeepHeb", "'deephebb'"),
        ("arch", "resnet-50", "'resnet50'"),
        ("data", "fashion_mnist", "'fashion-mnist'"),
        ("normalize", "absmix", "'absmax'"),
        ("schedule", "cosin", "'cosine'"),
    ],
)
def test_names_come_with_the_nearest(field, value, nearest):
    with pytest.raises(ValueError, match=f"--{field} is '{value}'.*did you mean {nearest}"):
        Config.resolve({field: value})


def test_device_must_be_one_of_this_machine():
    with pytest.raises(ValueError, match="--device 'gpu': expected a device"):
        Config.resolve({"device": "gpu"})


def test_json_round_trip(tmp_path):
    config = Config.resolve({"lr": 0.1})
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rule": "ghl"}'])
def test_damaged_json_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: expected the settings of a run"):
        Config.load(path)


def test_edited_json_is_validated(tmp_path):
    path = tmp_path / "config.json"
    Config.resolve({}).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lr": -1}))
    with pytest.raises(ValueError, match="--lr -1"):
        Config.load(path)


def test_resume_allows_another_place_but_no_other_settings():
    config = Config.resolve({"lr": 0.1})
    moved = config.resumed({"lr": 0.1, "root": "/data", "workers": 3})
    assert (moved.root, moved.workers, moved.lr) == ("/data", 3, 0.1)
    with pytest.raises(ValueError, match=r"--epochs 7 \(the run has 100\), --lr 0.2"):
        config.resumed({"epochs": 7, "lr": 0.2, "seed": 0})
