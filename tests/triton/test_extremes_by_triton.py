"""Numbers at the ends of what floats hold: NaN and infinity, any temperature, equal neurons."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import small_tiles as forms
import torch
from cases import Conv, Layer, Linear, assert_pair, wide
from small_tiles import Form
from test_pair import assert_sums_beyond_float16
from test_update import with_value

from ghl_kernels import Rule
from ghl_kernels.rule import CHOICES

Use = Callable[[Form], None]
LAYERS: dict[str, Layer] = {
    "linear": Linear(20, 3, 18),
    "conv": Conv(2, 16, (2, 3), 18, kernel=(1, 2)),
    "few_channels": Conv(2, 2, (2, 3), 18, kernel=(1, 2), padding=(0, 1)),
    "depthwise": Conv(2, 3, (2, 3), 3, kernel=(2, 2), padding=(1, 0), groups=3),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
of_tiles = pytest.mark.parametrize("form", ["MANY_SPLITS", "WHOLE_ROWS"])


@layers
@of_tiles
@pytest.mark.parametrize("competition", CHOICES["competition"])
def test_nan_and_infinity_reach_what_they_reach_in_the_reference(
    layer: Layer, form: str, competition: str, fused: None, use: Use
) -> None:
    """In a middle element of x, y and g, and NaN in the first and the last of y."""
    use(getattr(forms, form))
    rule = Rule(competition=competition)
    where = [(0, 0.4, "nan"), (2, 0.4, "-inf"), (1, 0, "nan"), (1, 1, "nan")]
    for argument, place, value in (*where, (1, 0.4, "inf"), (1, 0.4, "-inf")):
        tensors = with_value(layer.tensors(), argument, place, float(value))
        exact, sums = layer.reference(wide(tensors), rule), layer.pair(tensors, rule)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            for name, actual in zip(("G", "H0"), sums[:2], strict=True):
                same = torch.equal(kind(actual), kind(getattr(exact, name)))
                assert same, f"{kind.__name__}({name}) for {value} in {'xyg'[argument]}"


@pytest.mark.parametrize("competition", ["softmax", "softhebb", "hard"])
def test_stored_u_of_nan_and_infinity(competition: str, use: Use, forced: Callable) -> None:
    """A whole row of either, and one of each among finite numbers."""
    inf, nan = float("inf"), float("nan")
    layer, rule = Linear(8, 2, 5), Rule(competition=competition)
    x, y, g, w = layer.tensors()
    y[1], y[2], y[3] = inf, -inf, nan
    y[4, 2], y[5, :2], y[6, 1] = inf, torch.tensor([nan, inf]), -inf
    for rows in range(8):
        one = [t[rows : rows + 1] for t in (x, y, g)]
        wanted = Linear(1, 2, 5).reference(wide((*one, w)), rule).H0.isnan()
        for implementation in ("triton", "triton_stored", "library"):
            with forced(implementation):
                H0 = Linear(1, 2, 5).pair((*one, w), rule)[1]
            assert torch.equal(H0.isnan(), wanted), (implementation, y[rows])


def test_sums_beyond_float16(implementation: str) -> None:
    assert_sums_beyond_float16(1000)


@of_tiles
@pytest.mark.parametrize("tau", [1e-6, 1e-3, 0.25, 1e4, 1e30])
def test_any_temperature(tau: float, form: str, fused: None, use: Use) -> None:
    use(getattr(forms, form))
    layer = LAYERS["linear"]
    for competition in ("softmax", "softhebb"):
        assert_pair(layer, layer.tensors(), Rule(competition=competition, tau=tau))


@of_tiles
def test_large_logits(form: str, fused: None, use: Use) -> None:
    """y / tau of thousands, where an exponential of it alone would overflow."""
    use(getattr(forms, form))
    for layer, dtype in zip(LAYERS.values(), itertools.cycle((torch.float32, torch.float16))):
        x, y, g, w = layer.tensors(dtype)
        assert_pair(layer, (x, y * 1e3, g, w))
        assert_pair(layer, (x, y + 3e4, g, w), Rule(tau=0.6))


@of_tiles
@pytest.mark.parametrize("competition", CHOICES["competition"])
def test_the_first_of_equal_neurons_wins(
    competition: str, form: str, fused: None, use: Use
) -> None:
    use(getattr(forms, form))
    layer = LAYERS["linear"]
    x, y, g, w = layer.tensors()
    for ties in (y.round(), torch.zeros_like(y)):
        assert_pair(layer, (x, ties, g, w), Rule(competition=competition))


@of_tiles
def test_the_first_neuron_wins_a_row_of_minus_infinity(form: str, fused: None, use: Use) -> None:
    use(getattr(forms, form))
    layer = LAYERS["linear"]
    x, y, g, w = layer.tensors()
    y[1], y[4] = float("-inf"), -1.0
    assert_pair(layer, (x, y, g, w), Rule(competition="hard"))
