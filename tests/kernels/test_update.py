"""The update in one call: the pair with the merge as its epilogue, for every rule."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    Conv,
    Layer,
    Linear,
    Tensors,
    assert_update,
    condition,
    divisor,
    largest,
    magnitude_of_H,
    magnitudes,
    tolerance,
    wide,
)
from torch import Tensor

from ghl_kernels import PRESETS, Rule, reference
from ghl_kernels.rule import CHOICES

LAYERS: dict[str, Layer] = {
    "linear": Linear(37, 19, 14),
    "conv": Conv(3, 4, (6, 7), 13, padding=(1, 1)),
    "grouped": Conv(2, 6, (6, 5), 15, kernel=(2, 3), stride=(2, 1), padding=(0, 1), groups=3),
}
RULES = [Rule(c, 0.8, d, g, n) for c, d, g, n in itertools.product(*CHOICES.values())]
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
pytestmark = pytest.mark.usefixtures("implementation")


def assert_layer_update(layer: Layer, tensors: Tensors, rule: Rule) -> None:
    """Against the reference with the weight as the forward used it: in the dtype of x."""
    x, y, g, w = tensors
    update = layer.update(tensors, rule)[0]
    assert update.dtype == w.dtype
    assert update.stride() == torch.empty_like(w).stride()

    used = (x, y, g, w.to(x.dtype))
    exact, natural = layer.reference(wide(used), rule), layer.reference(used, rule)
    sums = magnitudes(layer, used, rule)
    u_sum = reference.compete(y.double(), rule).abs().movedim(1, 0).flatten(1).sum(1)
    scale = largest(magnitude_of_H(sums.H0, u_sum, used[3], rule)) * condition(y, rule)
    rows = y.numel() // y.shape[1]
    sure = exact.G.abs() > tolerance(exact.G, natural.G, largest(sums.G))
    assert sure.double().mean() > 0.8
    assert_update(update, exact, natural, scale / divisor(exact.H, rows, rule), sure, rule)


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("competition", CHOICES["competition"])
@pytest.mark.parametrize("decay", CHOICES["decay"])
def test_every_rule(layer: Layer, competition: str, decay: str, dtype: torch.dtype) -> None:
    """All gates and normalisations of this competition and decay."""
    tensors = layer.tensors(dtype)
    for rule in RULES:
        if (rule.competition, rule.decay) == (competition, decay):
            assert_layer_update(layer, tensors, rule)


@layers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_with_a_weight_in_its_own_or_a_wider_dtype(
    layer: Layer, dtype: torch.dtype, threads: int
) -> None:
    x, y, g, w = layer.tensors(dtype)
    for weight in (w, torch.randn(w.shape, dtype=torch.promote_types(dtype, torch.float32))):
        for rule in PRESETS.values():
            assert_layer_update(layer, (x, y, g, weight), rule)


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_weight_counts_as_the_forward_rounded_it(
    layer: Layer, dtype: torch.dtype
) -> None:
    """s is <H0, w> exactly only for the w that made y; the unrounded one is another update."""
    x, y, g, _ = layer.tensors(dtype)
    w, rule = layer.tensors()[3], Rule()
    update = layer.update((x, y, g, w), rule)[0]
    assert torch.equal(update, layer.update((x, y, g, w.to(dtype).float()), rule)[0])
    sums = layer.pair((x, y, g, w), rule)
    unrounded = torch.ops.ghl_kernels.merge(*sums, w, rule.decay, rule.gate, rule.normalize)[0]
    assert not torch.equal(update, unrounded)


@layers
def test_every_layout_of_the_weight(layer: Layer) -> None:
    for layout in LAYOUTS:
        if isinstance(layer, Conv) or layout != "channels_last":
            x, y, g, w = layer.tensors()
            assert_layer_update(layer, (x, y, g, LAYOUTS[layout](w)), Rule())


@layers
def test_one_call_is_the_pair_and_then_the_merge(layer: Layer) -> None:
    """With the statistics of the merge: <G, H>, |G|^2 and |H|^2, of neurons and of the layer."""
    tensors, rule = layer.tensors(), Rule()
    update, neurons, of_layer = layer.update(tensors, rule)
    sums = layer.pair(tensors, rule)
    merged = torch.ops.ghl_kernels.merge(*sums, tensors[3], rule.decay, rule.gate, rule.normalize)
    for actual, wanted in zip((update, neurons, of_layer), merged, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    exact = layer.reference(wide(tensors), rule)
    products = (exact.G * exact.H, exact.G**2, exact.H**2)
    wanted = torch.stack([p.flatten(1).sum(1) for p in products]).float()
    torch.testing.assert_close(neurons, wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(of_layer, wanted.sum(1), rtol=1e-4, atol=1e-3)


@layers
@pytest.mark.parametrize("gate", CHOICES["gate"])
def test_an_empty_batch_updates_nothing(layer: Layer, gate: str) -> None:
    x, y, g, w = layer.tensors()
    for competition, normalize in itertools.product(CHOICES["competition"], CHOICES["normalize"]):
        rule = Rule(competition=competition, gate=gate, normalize=normalize)
        results = layer.update((x[:0], y[:0], g[:0], w), rule)
        assert [t.count_nonzero().item() for t in results] == [0, 0, 0]


@layers
def test_a_zero_gradient_updates_nothing(layer: Layer) -> None:
    """Even expanded from one number, as an unused output sends it."""
    x, y, g, w = layer.tensors()
    zero = torch.zeros(()).expand(g.shape)
    for rule in (Rule(), Rule(gate="sign_only"), Rule(gate="gradient")):
        assert layer.update((x, y, zero, w), rule)[0].count_nonzero() == 0


@layers
def test_inputs_are_left_as_they_are(layer: Layer) -> None:
    tensors = layer.tensors()
    before = [t.clone() for t in tensors]
    for rule in PRESETS.values():
        layer.update(tensors, rule)
    assert all(map(torch.equal, tensors, before))


@layers
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("argument", range(3), ids="xyg")
def test_nan_and_infinity_reach_what_they_reach_in_the_reference(
    layer: Layer, argument: int, value: float, implementation: str
) -> None:
    """In the first, a middle or the last element of an activation, which differ for rules alike.

    PyTorch's convolutions skip the padding, which the reference multiplies by zero.
    """
    if implementation == "composed" and isinstance(layer, Conv):
        layer = dataclasses.replace(layer, padding=(0, 0))
    for place, rule in zip(itertools.cycle((0, 0.4, 0.7, 1)), RULES):
        tensors = with_value(layer.tensors(), argument, place, value)
        exact = layer.reference(wide(tensors), rule)
        sums, update = layer.pair(tensors, rule), layer.update(tensors, rule)[0]
        for name, actual in (("G", sums[0]), ("H0", sums[1]), ("update", update)):
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                same = torch.equal(kind(actual), kind(getattr(exact, name)))
                assert same, f"{kind.__name__}({name}) under {rule}"


@layers
@pytest.mark.parametrize("argument", range(4), ids="xygw")
def test_nan_is_never_hidden(layer: Layer, argument: int) -> None:
    """By no gate and by no maximum that depends on the tensor it is in, padded or not."""
    of_gate = {"sign": "xygw", "hebb": "xyw", "sign_only": "xg", "gradient": "xg"}
    for place, rule in itertools.product((0, 0.4, 1), RULES):
        without_w = argument == 3 and rule.decay == "none"
        if "xygw"[argument] in of_gate[rule.gate] and not without_w:
            tensors = with_value(layer.tensors(), argument, place, float("nan"))
            assert layer.update(tensors, rule)[0].isnan().any(), (place, rule)


def with_value(tensors: list[Tensor], argument: int, place: float, value: float) -> list[Tensor]:
    """One element of one tensor, that share of the way through it, replaced."""
    flat = tensors[argument].view(-1)
    flat[round(place * (flat.numel() - 1))] = value
    return tensors
