"""G and H0 of both implementations against the reference in float64, on layers as life has them."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, LAYOUTS, MATRIX_LAYOUTS, Conv, Layer, Linear, assert_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from ghl_kernels import Rule
from ghl_kernels.rule import CHOICES

CONVOLUTIONS = {
    "plain": Conv(2, 3, (6, 5), 4),
    "padded": Conv(3, 5, (7, 9), 13, padding=(1, 1)),
    "strided": Conv(2, 4, (9, 8), 7, kernel=(3, 2), stride=(2, 3), padding=(1, 0)),
    "dilated": Conv(2, 3, (11, 10), 25, kernel=(2, 3), padding=(2, 3), dilation=(3, 2)),
    "wide_kernel": Conv(2, 2, (5, 12), 6, kernel=(1, 7), padding=(0, 3)),
    "tall_kernel": Conv(2, 2, (12, 5), 6, kernel=(5, 1), stride=(3, 1)),
    "pointwise": Conv(3, 33, (5, 5), 17, kernel=(1, 1)),
    "pointwise_strided": Conv(3, 6, (7, 7), 5, kernel=(1, 1), stride=(2, 2), padding=(1, 0)),
    "whole_image": Conv(5, 3, (4, 3), 8, kernel=(4, 3)),
    "grouped": Conv(2, 6, (6, 6), 15, padding=(1, 1), groups=3),
    "grouped_many": Conv(3, 20, (5, 4), 30, kernel=(2, 2), groups=10),
    "depthwise": Conv(2, 19, (6, 6), 19, padding=(1, 1), groups=19),
    "depthwise_multiplied": Conv(2, 5, (6, 7), 15, kernel=(3, 2), groups=5),
    "one_neuron": Conv(2, 3, (6, 6), 1),
    "one_column": Conv(2, 1, (6, 6), 5, kernel=(1, 1)),
    "one_position": Conv(1, 3, (3, 3), 5),
    "one_of_everything": Conv(1, 1, (1, 1), 1, kernel=(1, 1)),
    "more_padding_than_image": Conv(2, 2, (2, 1), 3, kernel=(4, 3), padding=(3, 4)),
    "tiles_with_tail": Conv(3, 4, (20, 21), 14, padding=(1, 1)),
    "many_columns": Conv(4, 37, (5, 5), 9, padding=(1, 1)),
}
LINEARS = {
    "plain": Linear(8, 5, 7),
    "one_row": Linear(1, 33, 10),
    "one_input": Linear(40, 1, 9),
    "one_neuron": Linear(30, 17, 1),
    "whole_tile": Linear(256, 32, 24),
    "one_more_than_a_tile": Linear(257, 65, 25),
    "four_tiles_with_tail": Linear(1001, 31, 26),
    "wide": Linear(19, 300, 130),
    "microtile_tail_per_thread": Linear(20, 40, 61),
}
LAYERS: dict[str, Layer] = {
    **{f"conv_{name}": layer for name, layer in CONVOLUTIONS.items()},
    **{f"linear_{name}": layer for name, layer in LINEARS.items()},
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
pytestmark = pytest.mark.usefixtures("implementation")


@layers
def test_pair_is_the_references(layer: Layer, threads: int) -> None:
    """Every shape, with rows or neurons over the threads, as csrc/cpu/pair.h's Split decides."""
    assert_pair(layer, layer.tensors())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["conv_grouped", "conv_tiles_with_tail", "linear_wide"])
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]
    assert_pair(layer, layer.tensors(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("competition", CHOICES["competition"])
@pytest.mark.parametrize("name", ["conv_padded", "conv_tiles_with_tail", "linear_plain"])
def test_every_competition(name: str, competition: str, dtype: torch.dtype, threads: int) -> None:
    """In both memory orders of y, since u is computed along or across it."""
    layer = LAYERS[name]
    rule = Rule(competition=competition, tau=0.7)
    x, y, g, w = layer.tensors(dtype)
    assert_pair(layer, (x, y, g, w), rule)
    order = LAYOUTS["channels_last"] if isinstance(layer, Conv) else LAYOUTS["reversed"]
    assert_pair(layer, (x, order(y), g, w), rule)


@pytest.mark.parametrize("argument", range(4), ids="xygw")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["padded", "grouped", "pointwise"])
def test_convolution_in_every_layout(name: str, layout: str, argument: int) -> None:
    """One tensor in another layout than the rest, NaN in every gap between its elements."""
    layer = CONVOLUTIONS[name]
    for others in ("contiguous", "channels_last"):
        tensors = [LAYOUTS[others](t) for t in layer.tensors()]
        tensors[argument] = LAYOUTS[layout](tensors[argument])
        assert_pair(layer, tensors)


@pytest.mark.parametrize("argument", range(4), ids="xygw")
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("name", ["one_row", "one_neuron", "one_more_than_a_tile"])
def test_linear_in_every_layout(name: str, layout: str, argument: int) -> None:
    tensors = LINEARS[name].tensors()
    tensors[argument] = MATRIX_LAYOUTS[layout](tensors[argument])
    assert_pair(LINEARS[name], tensors)


@pytest.mark.parametrize("name", ["conv_padded", "conv_tiles_with_tail", "linear_wide"])
def test_expanded_gradients(name: str, threads: int) -> None:
    """Stride 0 in every dimension, as sum().backward() sends, or in one of them."""
    layer = LAYERS[name]
    x, y, g, w = layer.tensors()
    for dimension in (None, *range(g.dim())):
        one = g.flatten()[0] if dimension is None else g.narrow(dimension, 0, 1)
        assert_pair(layer, (x, y, one.expand(g.shape), w))
    assert_pair(layer, (x.narrow(0, 0, 1).expand(x.shape), y.narrow(1, 0, 1).expand(y.shape), g, w))


def test_both_splits_over_the_same_layer(threads: int) -> None:
    """Few rows share out the neurons; many rows, or more sums than fit, share out rows or not."""
    for layer in (Linear(700, 50, 100), Linear(1100, 50, 100), Linear(1060, 1999, 1060)):
        assert_pair(layer, layer.tensors())


@settings(max_examples=40)
@given(
    rows=st.sampled_from([1, 2, 3, 7, 63, 255, 256, 258, 770]),
    inputs=st.integers(1, 70),
    neurons=st.integers(1, 30),
    competition=st.sampled_from(CHOICES["competition"]),
)
def test_linear_of_any_shape(rows: int, inputs: int, neurons: int, competition: str) -> None:
    layer = Linear(rows, inputs, neurons)
    assert_pair(layer, layer.tensors(), Rule(competition=competition))


@st.composite
def convolutions(draw: st.DrawFn) -> Conv:
    def pairs(least: int, most: int) -> tuple[int, int]:
        return draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    groups, kernel, dilation, padding = (
        draw(st.integers(1, 5)),
        pairs(1, 4),
        pairs(1, 3),
        pairs(0, 3),
    )
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)
    ]
    size = tuple(draw(st.integers(n, n + 9)) for n in least)
    return Conv(
        draw(st.integers(1, 4)),
        groups * draw(st.integers(1, 6)),
        (size[0], size[1]),
        groups * draw(st.integers(1, 14)),
        kernel,
        pairs(1, 3),
        padding,
        dilation,
        groups,
    )


@settings(max_examples=60)
@given(layer=convolutions(), layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 4))
def test_convolution_of_any_shape(layer: Conv, layouts: tuple[str, ...]) -> None:
    tensors = [LAYOUTS[name](t) for name, t in zip(layouts, layer.tensors(), strict=True)]
    assert_pair(layer, tensors)


@pytest.mark.parametrize("tau", [1e-6, 1e-3, 0.25, 1e4, 1e30])
@pytest.mark.parametrize("name", ["conv_padded", "linear_wide"])
def test_any_temperature(name: str, tau: float) -> None:
    layer = LAYERS[name]
    for competition in ("softmax", "softhebb"):
        assert_pair(layer, layer.tensors(), Rule(competition=competition, tau=tau))


@pytest.mark.parametrize("tau", [1e-39, 1e-45, 1e-300])
@pytest.mark.parametrize("name", ["conv_padded", "linear_wide"])
def test_the_largest_wins_at_a_temperature_too_small_for_its_dtype(name: str, tau: float) -> None:
    layer = LAYERS[name]
    tensors = layer.tensors()
    found, wanted = (layer.pair(tensors, Rule(c, t)) for c, t in (("softmax", tau), ("hard", 1.0)))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype: torch.dtype) -> None:
    layer = LINEARS["plain"]
    x, y, g, w = layer.tensors(dtype)
    assert_pair(layer, (x, y * 1e4, g, w))
    assert_pair(layer, (x, y + 3e4, g, w), Rule(tau=0.6))


@pytest.mark.parametrize("competition", CHOICES["competition"])
def test_the_first_of_equal_neurons_wins(competition: str) -> None:
    for name in ("conv_padded", "linear_wide"):
        layer = LAYERS[name]
        x, y, g, w = layer.tensors()
        for ties in (y.round(), torch.zeros_like(y)):
            assert_pair(layer, (x, ties, g, w), Rule(competition=competition))


@layers
def test_an_empty_batch_sums_to_zero(layer: Layer) -> None:
    x, y, g, w = layer.tensors()
    for competition in CHOICES["competition"]:
        sums = layer.pair((x[:0], y[:0], g[:0], w), Rule(competition=competition))
        assert [torch.count_nonzero(t).item() for t in sums] == [0, 0, 0]


@pytest.mark.parametrize("rows", [None, 0], ids=["a batch", "an empty batch"])
@pytest.mark.parametrize("name", ["conv_plain", "conv_grouped", "linear_plain"])
def test_totals_that_are_asked_for(name: str, rows: int | None) -> None:
    layer = LAYERS[name]
    *activations, w = layer.tensors()
    tensors = *(t[:rows] for t in activations), w
    operator, geometry = torch.ops.ghl_kernels.linear_pair, ()
    if isinstance(layer, Conv):
        operator, geometry = torch.ops.ghl_kernels.conv2d_pair, layer.geometry
    wanted = operator(*tensors, *geometry, "softmax", 1.0)
    for of, count in (("sums", len(w) + 1), ("rows", len(w) + 1), ("none", 0)):
        *pair, totals = operator(*tensors, *geometry, "softmax", 1.0, of)
        assert all(map(torch.equal, pair, wanted))
        assert totals.shape == (count,) and totals.isfinite().all()
        assert torch.equal(totals[-1:], wanted[2][-1:][:count])
    with pytest.raises(ValueError, match="totals is 'row', must be one of sums, rows, none"):
        operator(*tensors, *geometry, "softmax", 1.0, "row")


def test_no_inputs_at_all_gives_empty_sums() -> None:
    x, y, g, w = Linear(3, 1, 4).tensors()
    G, H0, totals = Linear(3, 0, 4).pair((x[:, :0], y, g, w[:, :0]), Rule())
    assert G.shape == H0.shape == (4, 0)
    torch.testing.assert_close(totals, torch.cat([torch.softmax(y, 1).sum(0), torch.tensor([3.0])]))


@pytest.mark.parametrize(
    "name", ["conv_grouped", "conv_tiles_with_tail", "linear_four_tiles_with_tail"]
)
def test_the_same_bits_for_the_same_threads(name: str, threads: int) -> None:
    layer = LAYERS[name]
    tensors = layer.tensors()
    once = layer.pair(tensors, Rule())
    for _ in range(5):
        assert all(map(torch.equal, layer.pair(tensors, Rule()), once))


@pytest.mark.parametrize("name", ["conv_padded", "linear_plain"])
def test_sums_of_two_batches_are_the_sums_of_both(name: str) -> None:
    """Linear in the data, so micro-batches add up; updates do not: sign(mean) is not mean(sign)."""
    layer = LAYERS[name]
    tensors, others, rule = layer.tensors(torch.float64), layer.tensors(torch.float64), Rule()
    w = tensors[3]
    both = [torch.cat([a, b]) for a, b in zip(tensors[:3], others[:3], strict=True)]
    first, second, whole = ((*three, w) for three in (tensors[:3], others[:3], both))
    sums = [a + b for a, b in zip(layer.pair(first, rule), layer.pair(second, rule), strict=True)]
    for added, wanted in zip(sums, layer.pair(whole, rule), strict=True):
        torch.testing.assert_close(added, wanted)

    merged_late = torch.ops.ghl_kernels.merge(*sums, w, rule.decay, rule.gate, rule.normalize)[0]
    torch.testing.assert_close(merged_late, layer.update(whole, rule)[0])
    merged_early = (layer.update(first, rule)[0] + layer.update(second, rule)[0]) / 2
    assert (merged_early - merged_late).abs().max() > 0.1


def assert_sums_beyond_float16(rows: int) -> None:
    """One neuron that wins every row: H0 is finite, and right, where float16 ends at 65504; and so
    is that of the neuron that never wins."""
    y = torch.tensor([7.0, 0.0]).expand(rows, 2).half()
    x, g = (torch.rand(rows, n).half() for n in (3, 2))
    x, w, rule = x * (250_000 / rows), torch.randn(2, 3).half(), Rule()
    sums = Linear(rows, 3, 2).pair((x, y, g, w), rule)
    exact = (torch.softmax(y.double(), 1).T @ x.double()).float()
    assert exact[0].min() > 1e5 and exact[1].max() < 200
    torch.testing.assert_close(sums[1], exact, rtol=3e-3, atol=0)
    update, *_ = Linear(rows, 3, 2).update((x, y, g, w), rule)
    assert update.isfinite().all()


@pytest.mark.parametrize("rows", [1000, 2**18])
def test_sums_beyond_float16(rows: int) -> None:
    assert_sums_beyond_float16(rows)


def test_sixteen_bit_inputs_are_summed_in_float32(implementation: str) -> None:
    """The native kernels lose nothing beyond what float32 sums of the same numbers lose."""
    if implementation == "composed":
        torch.ops.ghl_kernels.linear_pair(*Linear(1, 1, 1).tensors(), "softmax", 1.0)
        pytest.skip("PyTorch's own operators round their sums to 16 bits")
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("conv_tiles_with_tail", "conv_pointwise", "linear_one_more_than_a_tile"):
            layer = LAYERS[name]
            x, y, g, w = (t.float() for t in layer.tensors(dtype))
            sums = layer.pair((x.to(dtype), y.to(dtype), g.to(dtype), w), Rule())
            for actual, wanted in zip(sums, layer.pair((x, y, g, w), Rule()), strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)
