"""The merge of one layer and of many at once by the Triton kernels, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import LAYOUTS, MATRIX_LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge import RULES, assert_merge, assert_same_extremes, merge, sums
from test_pair_by_triton import DTYPES
from torch import Tensor

import ghl_kernels
from ghl_kernels import Rule
from ghl_kernels.rule import CHOICES
from ghl_kernels.triton import foreach_merge as many

pytestmark = pytest.mark.usefixtures("fused")
rules = pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.decay}-{r.gate}-{r.normalize}")
SHAPES = [(1, 1), (5, 1), (1, 40), (30, 16), (5, 3, 3, 3), (7, 1, 5, 2), (3, 70, 1, 1)]


@rules
def test_every_rule(rule: Rule) -> None:
    assert_merge(sums((5, 3, 3, 3)), rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    """Of the sums and the update alike; the statistics are in float32."""
    for rule in RULES[::7]:
        assert_merge(sums((13, 37), dtype), rule)


@pytest.mark.parametrize(
    "shape", [*SHAPES, (2, 5000), (70, 100), (1030, 1)], ids=lambda s: "x".join(map(str, s))
)
def test_every_shape(shape: tuple[int, ...]) -> None:
    """Several blocks of weights in a neuron, of neurons, and of neurons in a layer's statistics."""
    for rule in (Rule(), Rule(decay="instar", gate="hebb", normalize="mean")):
        assert_merge(sums(shape), rule)


def test_one_program_takes_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghl_kernels.triton.merge.MOST_PROGRAMS", 3)
    assert_merge(sums((70, 300)), Rule())


@settings(max_examples=15)
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
def test_every_layout(shape: tuple[int, ...], layouts: dict, argument: int) -> None:
    """One tensor in another memory order than the rest; the update in the order of w."""
    for of_one in layouts.values():
        tensors = [LAYOUTS["reversed"](t) for t in sums(shape)]
        tensors[argument] = of_one(tensors[argument])
        assert_merge(tensors, Rule())


def test_expanded_sums() -> None:
    G, H0, totals, w = sums((6, 3, 3, 2))
    assert_merge([G[:1].expand(G.shape), H0[..., :1].expand(H0.shape), totals, w], Rule())
    assert_merge([G, H0, totals[-1:].expand(totals.shape), w], Rule(decay="instar"))


def test_a_layer_without_inputs_has_an_empty_update() -> None:
    update, neurons, layer = merge(sums((4, 0)), Rule(gate="gradient"))
    assert update.shape == (4, 0)
    assert [neurons.count_nonzero().item(), layer.count_nonzero().item()] == [0, 0]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("argument", range(4), ids=["G", "H0", "totals", "w"])
def test_nan_and_infinity_reach_what_they_reach_in_the_reference(argument: int, value: str) -> None:
    for decay, gate in itertools.product(CHOICES["decay"], ("sign", "hebb")):
        assert_same_extremes(argument, 0, float(value), Rule(decay=decay, gate=gate))


def together(layers: list[list[Tensor]], rule: Rule) -> list[tuple[Tensor, ...]]:
    """Update, statistics of neurons and of the layer, for each of the layers in one call."""
    choices = rule.decay, rule.gate, rule.normalize
    results = torch.ops.ghl_kernels.foreach_merge(*zip(*layers, strict=True), *choices)
    return list(zip(*results, strict=True))


def assert_each_as_alone(layers: list[list[Tensor]], rule: Rule) -> None:
    """The statistics may be summed in other blocks than alone, all else is the same."""
    for results, tensors in zip(together(layers, rule), layers, strict=True):
        for actual, alone in zip(results, merge(tensors, rule), strict=True):
            torch.testing.assert_close(actual, alone, rtol=4e-6, atol=1e-7)
            assert actual.stride() == alone.stride()
        assert_merge(tensors, rule)


@pytest.mark.parametrize("rule", RULES[::7], ids=lambda r: f"{r.decay}-{r.gate}-{r.normalize}")
def test_many_layers_at_once_are_each_merged_alone(rule: Rule) -> None:
    """In every layout, with the largest |H| and the statistics of each layer its own."""
    layers = [sums(shape) for shape in SHAPES[::2]]
    layers += [[LAYOUTS["channels_last"](t) if t.dim() == 4 else t for t in sums((6, 5, 3, 2))]]
    layers += [[LAYOUTS["reversed"](t) for t in sums((20, 30))]]
    assert_each_as_alone(layers, rule)


def test_layers_of_different_dtypes_go_together() -> None:
    """Sums in float32 beside sums in 16 bits, and a weight in another dtype than its sums."""
    layers = [sums((9, 20), dtype) for dtype in DTYPES * 2]
    layers[0][3] = layers[0][3].half()
    layers[-1][:3] = (t.float() for t in layers[-1][:3])
    for rule in (Rule(), Rule(decay="instar", gate="hebb", normalize="mean")):
        results = together(layers, rule)
        assert [r[0].dtype for r in results] == [tensors[0].dtype for tensors in layers]
        for one, tensors in zip(results, layers, strict=True):
            for actual, alone in zip(one, merge(tensors, rule), strict=True):
                eps = torch.finfo(actual.dtype).eps
                torch.testing.assert_close(actual, alone, rtol=16 * eps, atol=eps)


def test_the_memory_of_shares_serves_a_second_step() -> None:
    """Which program works for which layer is sent once; addresses go with every call."""
    layers = [sums((1 + 8 * (i % 2), 2)) for i in range(6)]
    many.remembered_shares.cache_clear()
    first = together(layers, Rule())
    second = together([[t.clone() for t in tensors] for tensors in layers], Rule())
    backend = ghl_kernels.last("foreach_merge")
    assert backend
    if backend.name == "triton":  # `cuda` sends its table with the launch
        assert many.remembered_shares.cache_info().hits >= 2
    for one, again, tensors in zip(first, second, layers, strict=True):
        assert all(map(torch.equal, one, again))
        torch.testing.assert_close(one[0], merge(tensors, Rule())[0])


def test_inputs_are_left_as_they_are() -> None:
    tensors = sums((5, 3, 3, 3))
    before = [t.clone() for t in tensors]
    merge(tensors, Rule())
    together([tensors, tensors], Rule())
    assert all(map(torch.equal, tensors, before))
