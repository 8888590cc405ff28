"""The merge: from sums to the update of a layer and its statistics, against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    MATRIX_LAYOUTS,
    assert_near,
    assert_update,
    divisor,
    largest,
    magnitude_of_H,
    tolerance,
    wide,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghl_kernels import Rule, reference
from ghl_kernels.layout import as_rows, is_channels_last
from ghl_kernels.rule import CHOICES

ROWS = 21
RULES = [
    Rule(decay=decay, gate=gate, normalize=normalize)
    for decay, gate, normalize in itertools.product(
        CHOICES["decay"], CHOICES["gate"], CHOICES["normalize"]
    )
]
SHAPES = [(1, 1), (5, 1), (1, 40), (13, 37), (30, 16), (5, 3, 3, 3), (7, 1, 5, 2), (3, 70, 1, 1)]
pytestmark = pytest.mark.usefixtures("implementation")


def sums(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """G, H0, totals and w, with some exact zeros in G."""
    G, H0, w = (torch.randn(shape) for _ in range(3))
    G[torch.rand(shape) < 0.1] = 0
    totals = torch.cat([torch.rand(shape[0]) * 3, torch.tensor([float(ROWS)])])
    return [t.to(dtype) for t in (G, H0, totals, w)]


def merge(tensors: list[Tensor], rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.ghl_kernels.merge(*tensors, rule.decay, rule.gate, rule.normalize)


def reference_merge(tensors: list[Tensor], rule: Rule) -> reference.Update:
    G, H0, totals, w = tensors
    return reference.merge(G, H0, totals[:-1], int(totals[-1]), w, rule)


def assert_merge(tensors: list[Tensor], rule: Rule) -> None:
    update, neurons, layer = merge(tensors, rule)
    G, H0, totals, w = tensors
    exact, natural = reference_merge(wide(tensors), rule), reference_merge(tensors, rule)
    H_scale = magnitude_of_H(H0.double().abs(), totals[:-1].double().abs(), w, rule)
    scale = largest(H_scale) / divisor(exact.H, ROWS, rule)
    assert_update(update, exact, natural, scale, torch.ones_like(G, dtype=torch.bool), rule)
    assert update.dtype == G.dtype
    assert update.stride() == torch.empty_like(w).stride()

    wanted, of_pytorch = (
        torch.stack([(a * b).flatten(1).sum(1) for a, b in ((u.G, u.H), (u.G, u.G), (u.H, u.H))])
        for u in (exact, natural)
    )
    magnitude = largest((G.double().abs() + H_scale).square().flatten(1).sum(1))
    assert_near("neurons", neurons, wanted, of_pytorch, magnitude)
    assert_near("layer", layer, wanted.sum(1), of_pytorch.sum(1), magnitude * w.shape[0])
    assert neurons.dtype == layer.dtype == torch.promote_types(G.dtype, torch.float32)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.decay}-{r.gate}-{r.normalize}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule(rule: Rule, dtype: torch.dtype) -> None:
    for shape in ((13, 37), (5, 3, 3, 3)):
        assert_merge(sums(shape, dtype), rule)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    for rule in (Rule(), Rule(decay="instar", gate="hebb", normalize="mean")):
        assert_merge(sums(shape, dtype), rule)


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).flatmap(
        lambda rest: st.integers(1, 40).map(lambda neurons: (neurons, *rest))
    ),
    rule=st.sampled_from(RULES),
)
def test_any_shape(shape: tuple[int, ...], rule: Rule) -> None:
    assert_merge(sums(shape), rule)


@pytest.mark.parametrize("argument", [0, 1, 3], ids=["G", "H0", "w"])
@pytest.mark.parametrize(
    ("shape", "layouts"), [((6, 3, 3, 2), LAYOUTS), ((13, 18), MATRIX_LAYOUTS)], ids=["4d", "2d"]
)
def test_every_layout(
    shape: tuple[int, ...], layouts: dict[str, Callable[[Tensor], Tensor]], argument: int
) -> None:
    """One tensor in another memory order than the rest; the update in the order of w."""
    for of_rest, of_one in itertools.product(layouts.values(), layouts.values()):
        tensors = sums(shape)
        tensors = [of_rest(t) if t.dim() > 1 else t for t in tensors]
        tensors[argument] = of_one(tensors[argument])
        assert_merge(tensors, Rule())


@pytest.mark.parametrize("used_as", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 3, 2), (6, 5, 1, 1), (4, 3, 5)], ids=str)
def test_sums_as_layers_hold_them(
    shape: tuple[int, ...], layout: str, used_as: torch.dtype | None
) -> None:
    """H0 as rows in the order of the weight's memory, and the weight rounded as it was used."""
    order = LAYOUTS[layout if len(shape) == 4 or layout != "channels_last" else "contiguous"]
    layers = []
    for _ in range(2):
        G, H0, totals, w = sums(shape)
        layers.append([G, H0, totals, order(w)])
    choices = Rule().decay, Rule().gate, Rule().normalize
    held = [[G, as_rows(H0, is_channels_last(w)), t, w] for G, H0, t, w in layers]
    wanted = [merge([*one, w.to(used_as or w.dtype)], Rule()) for *one, w in layers]
    alone = [torch.ops.ghl_kernels.merge(*one, *choices, used_as) for one in held]
    lists = [list(one) for one in zip(*held, strict=True)]
    together = torch.ops.ghl_kernels.foreach_merge(*lists, *choices, used_as)
    for found in (alone, zip(*together, strict=True)):
        for results, expected in zip(found, wanted, strict=True):
            assert all(map(torch.equal, results, expected))
            assert results[0].stride() == torch.empty_like(expected[0]).stride()


def test_expanded_sums() -> None:
    G, H0, totals, w = sums((6, 3, 3, 2))
    assert_merge([G[:1].expand(G.shape), H0[..., :1].expand(H0.shape), totals, w], Rule())
    assert_merge([G, H0, totals[:1].expand(totals.shape) * 0 + ROWS, w], Rule(decay="instar"))


@pytest.mark.parametrize("wider", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("argument", [0, 1, 2, 3], ids=["G", "H0", "totals", "w"])
def test_sums_may_be_wider_than_the_weight_and_back(argument: int, wider: torch.dtype) -> None:
    """The arithmetic and the update are in the dtype of G, whatever the others come in."""
    tensors = sums((6, 5))
    narrower = torch.float64 if wider == torch.float32 else torch.float32
    mixed = [t.to(wider if i == argument else narrower) for i, t in enumerate(tensors)]
    wanted = merge([t.to(mixed[0].dtype) for t in tensors], Rule())
    for actual, expected in zip(merge(mixed, Rule()), wanted, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)


def test_a_zero_gradient_lets_nothing_pass() -> None:
    """sign(0) is 0, for either zero and for the smallest numbers only then."""
    G = torch.tensor([[0.0, -0.0, 1e-45, -1e-45, 1e-30, -3.0]])
    H0, w = torch.full_like(G, -2.0), torch.zeros_like(G)
    tensors = [G, H0, torch.ones(2), w]
    assert merge(tensors, Rule())[0].tolist() == [[0, 0, 1, -1, 1, -1]]
    assert merge(tensors, Rule(gate="sign_only"))[0].tolist() == [[0, 0, 1, -1, 1, -1]]


def test_absmax_is_over_the_whole_layer() -> None:
    """One neuron's largest is 1; the scale of the data does not matter, zero sums give zero."""
    G, H0, totals, w = sums((30, 17))
    rule = Rule(decay="none", gate="hebb")
    update = merge([G, H0, totals, w], rule)[0]
    assert (update.abs().amax(1) == 1).sum() == 1
    torch.testing.assert_close(merge([G, H0 * 1e6, totals, w], rule)[0], update)
    assert merge([G, H0 * 0, totals, w], Rule())[0].count_nonzero() == 0


def test_mean_of_no_rows_divides_by_one() -> None:
    G, H0, totals, w = sums((4, 3))
    totals[-1] = 0
    update = merge([G, H0, totals, w], Rule(decay="none", gate="hebb", normalize="mean"))[0]
    assert torch.equal(update, -H0)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.decay}-{r.gate}-{r.normalize}")
def test_nan_reaches_what_it_reaches_in_the_reference(rule: Rule) -> None:
    """At the first, a middle and the last element of G, H0, totals or w."""
    for argument, position in itertools.product(range(4), (0, 3, -1)):
        assert_same_extremes(argument, position, float("nan"), rule)


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize("argument", range(4), ids=["G", "H0", "totals", "w"])
def test_infinity_reaches_what_it_reaches_in_the_reference(argument: int, value: float) -> None:
    for rule, position in itertools.product(RULES, (0, 3, -1)):
        assert_same_extremes(argument, position, value, rule)


def assert_same_extremes(argument: int, position: int, value: float, rule: Rule) -> None:
    tensors = sums((5, 19))
    of_neurons = tensors[2][:-1] if argument == 2 else tensors[argument]
    of_neurons.view(-1)[position] = value
    update, exact = merge(tensors, rule)[0], reference_merge(wide(tensors), rule).update
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(update), kind(exact)), (argument, position, kind.__name__, rule)


def test_the_same_bits_for_the_same_threads(threads: int) -> None:
    tensors = sums((64, 300))
    once = merge(tensors, Rule())
    for _ in range(5):
        assert all(map(torch.equal, merge(tensors, Rule()), once))


def test_inputs_are_left_as_they_are() -> None:
    tensors = sums((5, 3, 3, 3))
    before = [t.clone() for t in tensors]
    merge(tensors, Rule())
    assert all(map(torch.equal, tensors, before))


def test_tolerance_is_not_blind() -> None:
    """An update off by a thousandth of its scale is not within any float32 tolerance here."""
    tensors = sums((13, 37))
    update = merge(tensors, Rule())[0].double()
    exact, natural = reference_merge(wide(tensors), Rule()), reference_merge(tensors, Rule())
    assert largest(update * 1.001 - exact.update) > tolerance(exact.update, natural.update, 5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_layers_at_once_are_each_merged_alone(dtype: torch.dtype) -> None:
    """In every layout, with the largest |H| and the statistics of each layer its own."""
    layers = [sums(shape, dtype) for shape in SHAPES]
    layers += [[LAYOUTS["channels_last"](t) if t.dim() == 4 else t for t in sums((6, 5, 3, 2))]]
    for rule in (Rule(), Rule(decay="instar", gate="hebb", normalize="mean")):
        choices = rule.decay, rule.gate, rule.normalize
        together = torch.ops.ghl_kernels.foreach_merge(*zip(*layers, strict=True), *choices)
        for one, tensors in zip(zip(*together, strict=True), layers, strict=True):
            for actual, alone in zip(one, merge(tensors, rule), strict=True):
                assert torch.equal(actual, alone)
                assert actual.stride() == alone.stride()
