"""G, H0 and totals of every kernel, in every form of its tile, against the reference in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import small_tiles as forms
import torch
from cases import Conv, Layer, Linear, assert_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tiles import Form
from test_pair import convolutions

from ghl_kernels import Rule
from ghl_kernels.rule import CHOICES
from ghl_kernels.triton.store_u import store_u

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU  # triton issue 11584
Use = Callable[[Form], None]

LINEARS = {
    "tails": Linear(40, 33, 20),
    "whole_tiles": Linear(64, 32, 32),
    "one_row": Linear(1, 17, 18),
    "one_input": Linear(40, 1, 18),
    "one_neuron": Linear(40, 17, 1),
    "one_of_everything": Linear(1, 1, 1),
    "for_descriptors": Linear(40, 40, 24),
}
CONVOLUTIONS = {
    "padded": Conv(2, 18, (3, 4), 18, padding=(1, 1)),
    "strided": Conv(2, 17, (7, 6), 18, kernel=(3, 2), stride=(2, 3), padding=(1, 0)),
    "dilated": Conv(2, 16, (4, 5), 17, kernel=(2, 3), padding=(1, 1), dilation=(3, 2)),
    "wide_kernel": Conv(2, 17, (3, 8), 6, kernel=(1, 3), padding=(0, 2)),
    "one_neuron": Conv(2, 16, (4, 4), 1),
    "three_channels": Conv(3, 3, (6, 5), 18, padding=(1, 1)),
    "one_channel": Conv(2, 1, (6, 6), 5, kernel=(2, 2)),
    "whole_image": Conv(5, 3, (4, 3), 18, kernel=(4, 3)),
    "more_padding_than_image": Conv(2, 2, (2, 1), 3, kernel=(4, 3), padding=(3, 4)),
    "grouped": Conv(2, 36, (4, 4), 34, kernel=(2, 1), groups=2),
    "grouped_few_channels": Conv(2, 6, (5, 4), 15, padding=(1, 1), groups=3),
    "depthwise": Conv(1, 19, (4, 5), 19, padding=(1, 1), groups=19),
    "depthwise_multiplied": Conv(2, 7, (5, 5), 21, (3, 2), (2, 1), (0, 1), (1, 2), groups=7),
    "pointwise": Conv(3, 33, (5, 5), 20, kernel=(1, 1)),
    "pointwise_strided": Conv(3, 18, (7, 7), 20, kernel=(1, 1), stride=(2, 2)),
    "pointwise_padded": Conv(2, 17, (3, 3), 5, kernel=(1, 1), padding=(1, 0)),
    "pointwise_grouped": Conv(2, 8, (3, 3), 20, kernel=(1, 1), groups=2),
}
LAYERS: dict[str, Layer] = {
    **{f"conv_{name}": layer for name, layer in CONVOLUTIONS.items()},
    **{f"linear_{name}": layer for name, layer in LINEARS.items()},
}
IN_FORMS = {
    "linear_tails": ("ONE_SPLIT", "WHOLE_ROWS", "WHOLE_ROWS_SPLIT"),
    "linear_for_descriptors": ("DESCRIPTORS", "DESCRIPTORS_WHOLE_ROWS"),
    "conv_padded": ("WHOLE_ROWS", "THREE_TAPS", "THREE_TAPS_WHOLE_ROWS", "PACKED_WHOLE_ROWS"),
    "conv_dilated": ("THREE_TAPS", "PACKED"),
    "conv_wide_kernel": ("THREE_TAPS_WHOLE_ROWS", "WHOLE_ROWS_SPLIT"),
    "conv_strided": ("THREE_TAPS", "PACKED_WHOLE_ROWS"),  # three taps do not divide its kernel
    "conv_three_channels": ("ONE_SPLIT", "PACKED_WHOLE_ROWS"),
    "conv_grouped": ("WHOLE_ROWS", "PACKED"),
    "conv_depthwise": ("ONE_SPLIT",),
    "conv_pointwise": ("WHOLE_ROWS",),
    "conv_pointwise_strided": ("WHOLE_ROWS", "PACKED"),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_pair_is_the_references(layer: Layer, fused: None) -> None:
    """With several tiles and splits; and in the memory order that kernels like best."""
    tensors = layer.tensors()
    if isinstance(layer, Conv):
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    assert_pair(layer, tensors)


@pytest.mark.parametrize("name", ["triton_stored", "library"])
@pytest.mark.parametrize("layer", list(LAYERS)[1::2])
def test_pair_of_a_stored_u_is_the_references(layer: str, name: str, forced: Callable) -> None:
    """In contiguous order, which the images of a stored u do not have."""
    with forced(name):
        assert_pair(LAYERS[layer], LAYERS[layer].tensors())


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, all_of in IN_FORMS.items() for form in all_of]
)
def test_every_form_of_a_tile(name: str, form: str, fused: None, use: Use) -> None:
    """In 16 bits and in contiguous order, as networks in NCHW have it."""
    use(getattr(forms, form))
    assert_pair(LAYERS[name], LAYERS[name].tensors(torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("competition", CHOICES["competition"])
@pytest.mark.parametrize("form", ["MANY_SPLITS", "WHOLE_ROWS"])
@pytest.mark.parametrize(
    "layer",
    [Linear(40, 17, 20), Conv(2, 16, (4, 4), 20, (1, 3)), Conv(2, 3, (4, 4), 3, groups=3)],
    ids=["linear", "conv", "depthwise"],
)
def test_every_competition_in_every_dtype(
    layer: Layer, form: str, competition: str, dtype: torch.dtype, fused: None, use: Use
) -> None:
    use(getattr(forms, form))
    rule = Rule(competition=competition, tau=0.7)
    assert_pair(layer, layer.tensors(dtype), rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("competition", CHOICES["competition"])
def test_u_may_be_stored(
    competition: str, dtype: torch.dtype, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows in one tile, and of rows longer than the longest that is one."""
    monkeypatch.setattr("ghl_kernels.triton.store_u.LONGEST_ROW", 8)
    for layer in (Linear(20, 4, 7), Linear(20, 4, 21)):
        assert_pair(layer, layer.tensors(dtype), Rule(competition=competition, tau=0.7))


@pytest.mark.parametrize("longest", [8, 4096])
def test_rows_of_u_at_multiples_of_eight(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghl_kernels.triton.store_u.LONGEST_ROW", longest)
    y = torch.randn(70, 21)
    u, dense = store_u(y, "softmax", 0.7, apart=8), store_u(y, "softmax", 0.7)
    assert u.stride() == (24, 1) and dense.is_contiguous()
    assert torch.equal(u, dense)
    torch.testing.assert_close(u, torch.softmax(y / 0.7, 1))


@pytest.mark.parametrize("form", ["WHOLE_ROWS", "MANY_SPLITS"])
@pytest.mark.parametrize("name", ["conv_whole_image", "conv_depthwise", "linear_tails"])
def test_totals_hold_rows_where_nobody_asks_for_sums_of_u(
    name: str, form: str, fused: None, use: Use
) -> None:
    use(getattr(forms, form))
    layer = LAYERS[name]
    tensors = layer.tensors()
    operator, geometry = torch.ops.ghl_kernels.linear_pair, ()
    if isinstance(layer, Conv):
        operator, geometry = torch.ops.ghl_kernels.conv2d_pair, layer.geometry
    G, H0, totals = operator(*tensors, *geometry, "softmax", 1.0, totals="sums")
    without = operator(*tensors, *geometry, "softmax", 1.0, totals="rows")
    assert torch.equal(without[0], G)
    assert torch.equal(without[1], H0)
    assert without[2].shape == totals.shape and without[2][-1] == totals[-1]
    assert without[2].isfinite().all()  # they are added up with others
    assert operator(*tensors, *geometry, "softmax", 1.0, totals="none")[2].shape == (0,)


@pytest.mark.parametrize(
    "name", ["conv_padded", "conv_depthwise", "conv_pointwise", "conv_grouped", "linear_tails"]
)
def test_an_empty_batch_sums_to_zero(name: str, implementation: str) -> None:
    x, y, g, w = LAYERS[name].tensors()
    for competition in CHOICES["competition"]:
        sums = LAYERS[name].pair((x[:0], y[:0], g[:0], w), Rule(competition=competition))
        assert [torch.count_nonzero(t).item() for t in sums] == [0, 0, 0]


def test_no_inputs_at_all_gives_empty_sums(implementation: str) -> None:
    x, y, g, w = Linear(3, 1, 4).tensors()
    G, H0, totals = Linear(3, 0, 4).pair((x[:, :0], y, g, w[:, :0]), Rule())
    assert G.shape == H0.shape == (4, 0)
    rows = torch.tensor([3.0])
    torch.testing.assert_close(totals, torch.cat([torch.softmax(y, 1).sum(0), rows]))


@settings(max_examples=8)
@given(
    layer=st.builds(Linear, st.integers(1, 60), st.integers(1, 40), st.integers(1, 40)),
    form=st.sampled_from(["ONE_SPLIT", "MANY_SPLITS", "WHOLE_ROWS", "DESCRIPTORS"]),
    competition=st.sampled_from(CHOICES["competition"]),
)
def test_linear_of_any_shape(
    layer: Linear, form: str, competition: str, fused: None, use: Use
) -> None:
    use(getattr(forms, form))
    assert_pair(layer, layer.tensors(), Rule(competition=competition))


@settings(max_examples=12)
@given(
    layer=convolutions(),
    form=st.sampled_from(["ONE_SPLIT", "MANY_SPLITS", "THREE_TAPS", "PACKED_WHOLE_ROWS"]),
)
def test_convolution_of_any_shape(layer: Conv, form: str, fused: None, use: Use) -> None:
    layer = dataclasses.replace(layer, batch=1)
    use(getattr(forms, form))
    assert_pair(layer, layer.tensors())
