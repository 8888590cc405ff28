"""The rule as a value: presets, and an error that names what is wrong with it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ghl_kernels import PRESETS, Rule
from ghl_kernels.rule import CHOICES


def test_default_is_the_published_rule() -> None:
    published = Rule(competition="softmax", tau=1.0, decay="oja", gate="sign", normalize="absmax")
    assert Rule() == published == Rule.preset("ghl")


@pytest.mark.parametrize(
    ("name", "gate"), [("ghl", "sign"), ("hebb", "hebb"), ("sign", "sign_only"), ("bp", "gradient")]
)
def test_presets_differ_in_their_gate_only(name: str, gate: str) -> None:
    assert Rule.preset(name) == Rule(gate=gate) == Rule.of(name)


def test_the_presets_are_the_four_published_names() -> None:
    assert set(PRESETS) == {"ghl", "hebb", "sign", "bp"}


def test_of_keeps_a_rule_as_it_is() -> None:
    rule = Rule(tau=0.5)
    assert Rule.of(rule) is rule


@pytest.mark.parametrize(
    ("argument", "value"), [(a, v) for a, choices in CHOICES.items() for v in choices]
)
def test_every_choice_of_the_vocabulary_is_accepted(argument: str, value: str) -> None:
    assert getattr(Rule(**{argument: value}), argument) == value


@pytest.mark.parametrize("argument", CHOICES)
def test_unknown_choice_names_argument_value_and_choices(argument: str) -> None:
    choices = ", ".join(CHOICES[argument])
    with pytest.raises(ValueError, match=f"{argument} is 'bogus', must be one of {choices}$"):
        Rule(**{argument: "bogus"})


@pytest.mark.parametrize(
    ("argument", "value", "nearest"),
    [("competition", "sofmax", "softmax"), ("decay", "Oja", "oja"), ("normalize", "max", "absmax")],
)
def test_unknown_choice_suggests_the_nearest(argument: str, value: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        Rule(**{argument: value})


@pytest.mark.parametrize("value", [None, 0, ["softmax"], True])
def test_choice_of_another_type_is_an_error(value: object) -> None:
    with pytest.raises(ValueError, match=r"competition is .*must be one of"):
        Rule(competition=value)
    with pytest.raises((TypeError, ValueError), match=r"rule is .*must be"):
        Rule.of(value)


@pytest.mark.parametrize("name", ["ghI", "gh", "", "oja"])
def test_unknown_preset_names_the_presets(name: str) -> None:
    with pytest.raises(ValueError, match=f"rule is '{name}', must be one of ghl, hebb, sign, bp"):
        Rule.of(name)


@pytest.mark.parametrize("tau", [0, 0.0, -0.0, -1, float("nan"), float("inf"), -float("inf")])
def test_tau_must_be_finite_and_positive(tau: float) -> None:
    with pytest.raises(ValueError, match=r"tau is .*must be finite and greater than 0"):
        Rule(tau=tau)


@pytest.mark.parametrize("tau", ["1", None, True, [1.0], 1j])
def test_tau_must_be_a_number(tau: object) -> None:
    with pytest.raises(TypeError, match=r"tau is .*must be a number"):
        Rule(tau=tau)


@pytest.mark.parametrize("tau", [2, np.float32(2), np.int64(2)])
def test_a_number_of_another_kind_is_the_same_rule(tau: float) -> None:
    assert Rule(tau=tau) == Rule(tau=2.0)
    assert type(Rule(tau=tau).tau) is float


def test_rules_are_immutable_and_hashable() -> None:
    rule = Rule()
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.tau = 2.0
    assert {rule: 1}[Rule()] == 1


def test_replace_changes_one_choice_and_validates_it() -> None:
    rule = Rule(decay="none", tau=0.25)
    assert rule.replace(gate="hebb") == Rule(decay="none", tau=0.25, gate="hebb")
    with pytest.raises(ValueError, match="tau is -1"):
        rule.replace(tau=-1)
