"""Tensors as autograd and networks hand them over: strided, sliced, transposed, expanded."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import small_tiles as forms
from cases import LAYOUTS, MATRIX_LAYOUTS, Conv, Layer, Linear, assert_pair
from small_tiles import Form

LINEAR = Linear(20, 17, 18)
CONVOLUTIONS = {
    "conv": Conv(2, 16, (3, 4), 18, kernel=(2, 1)),
    "few_channels": Conv(2, 3, (3, 4), 18, kernel=(2, 2)),
    "depthwise": Conv(2, 3, (3, 4), 6, kernel=(2, 2), groups=3),
    "pointwise": Conv(2, 17, (3, 4), 18, kernel=(1, 1)),
}
LAYERS: dict[str, Layer] = {"linear": LINEAR, **CONVOLUTIONS}


@pytest.mark.parametrize("argument", range(4), ids="xygw")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_in_every_layout(
    name: str, argument: int, fused: None, use: Callable[[Form], None]
) -> None:
    """One tensor in another layout than the rest, NaN in every gap between its elements."""
    use(forms.ONE_TILE)
    layer = CONVOLUTIONS[name]
    for layout, others in zip(LAYOUTS.values(), itertools.cycle(list(LAYOUTS.values())[:2])):
        tensors = [others(t) for t in layer.tensors()]
        tensors[argument] = layout(tensors[argument])
        assert_pair(layer, tensors)


@pytest.mark.parametrize("argument", range(4), ids="xygw")
def test_linear_in_every_layout(argument: int, fused: None, use: Callable[[Form], None]) -> None:
    use(forms.ONE_TILE)
    for layout in MATRIX_LAYOUTS.values():
        tensors = LINEAR.tensors()
        tensors[argument] = layout(tensors[argument])
        assert_pair(LINEAR, tensors)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_expanded_gradients(layer: Layer, fused: None) -> None:
    """Stride 0 in every dimension, as sum().backward() sends, or in one of them."""
    x, y, g, w = layer.tensors()
    for dimension in (None, 1):
        one = g.flatten()[0] if dimension is None else g.narrow(dimension, 0, 1)
        assert_pair(layer, (x, y, one.expand(g.shape), w))
    assert_pair(layer, (x.narrow(0, 0, 1).expand(x.shape), y.narrow(1, 0, 1).expand(y.shape), g, w))


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_what_the_copy_engine_cannot_read_is_read_by_pointers(
    layout: str, fused: None, use: Callable[[Form], None]
) -> None:
    """A tile may ask for descriptors; the tensors' addresses and strides decide."""
    use(forms.DESCRIPTORS)
    layer = Linear(20, 24, 16)
    for argument in range(3):
        tensors = layer.tensors()
        tensors[argument] = MATRIX_LAYOUTS[layout](tensors[argument])
        assert_pair(layer, tensors)


@pytest.mark.parametrize("layer", [LINEAR, CONVOLUTIONS["few_channels"]], ids=["linear", "conv"])
def test_a_stored_u_of_every_layout(layer: Layer, implementation: str) -> None:
    """u is written contiguous, whatever the strides of y, 0 among them."""
    x, y, g, w = layer.tensors()
    for strided in (y.narrow(1, 0, 1).expand(y.shape), MATRIX_LAYOUTS["reversed"](y)):
        assert_pair(layer, (x, strided, g, w))
