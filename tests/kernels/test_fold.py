"""A folded layer is the same layer: its windows are patches, its sums come back to the weight."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import Conv, problem_of
from hypothesis import given
from hypothesis import strategies as st

from ghl_kernels import Problem, splits
from ghl_kernels.composed import weight_gradient
from ghl_kernels.fold import Fold, fold_images
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import Tile
from ghl_kernels.tuning.tune import TILES, useful

RESNET = Problem(256 * 112 * 112, 64, 3, torch.bfloat16, (7, 7), (2, 2), padding=(3, 3))
VGG = Problem(256 * 224 * 224, 64, 3, torch.bfloat16, (3, 3), padding=(1, 1))
VIT = Problem(256 * 14 * 14, 768, 3, torch.bfloat16, (16, 16), (16, 16))


@st.composite
def foldable_layers(draw: st.DrawFn) -> Conv:
    def pairs(least: int, most: int) -> tuple[int, int]:
        return draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    kernel, stride, padding = pairs(1, 7), pairs(1, 4), pairs(0, 4)
    dilation_h = draw(st.integers(1, 3)) if stride[0] == 1 or kernel[0] == 1 else 1
    dilation = dilation_h, draw(st.integers(1, 3)) if kernel[1] == 1 else 1
    reach = zip(dilation, kernel, padding, strict=True)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in reach]
    size = draw(st.integers(least[0], least[0] + 9)), draw(st.integers(least[1], least[1] + 9))
    batch, channels, neurons = (draw(st.integers(1, most)) for most in (3, 15, 5))
    return Conv(batch, channels, size, neurons, kernel, stride, padding, dilation)


def out_size(layer: Conv) -> tuple[int, int]:
    return layer.positions[0], layer.positions[1]


@given(layer=foldable_layers(), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_the_geometry(layer: Conv, dtype: torch.dtype) -> None:
    """Addresses are multiples of 16 bytes, windows stay in their row, nothing is superfluous."""
    problem = problem_of(layer, dtype)
    layout = Fold.of(problem)
    folded, shape = layout.folded(), layout.shape(layer.batch, out_size(layer))
    chunk = 16 // dtype.itemsize
    view = layout.images(torch.empty(shape, dtype=dtype, device="meta"), out_size(layer))
    image, channel, row, step = view.stride()
    assert channel == 1 and all(stride % chunk == 0 for stride in (image, row, step))
    assert folded.channels == view.shape[1] and folded.channels % 16 == 0
    assert (view.shape[3] - 1) * step + folded.channels <= row
    assert row * shape[1] == image and image * layer.batch == torch.Size(shape).numel()
    reach = (folded.kernel_size[0] - 1) * folded.dilation[0]
    assert view.shape[2] == layer.positions[0] + reach
    assert layer.channels <= layout.depth < layer.channels + chunk
    assert layer.kernel[1] <= layout.taps < layer.kernel[1] + 16
    assert tiles.kind(folded) == "conv" and folded.rows == problem.rows
    assert folded.kernel_size[0] * layer.stride[0] < layer.kernel[0] + layer.stride[0]


@given(layer=foldable_layers())
def test_the_convolution_and_the_way_back(layer: Conv) -> None:
    """G of the folded layer, of PyTorch's operators in float64, is that of the layer; numbers that
    the sums do not use are NaN."""
    problem = problem_of(layer, torch.float64)
    x, _, g, w = layer.tensors(torch.float64)
    layout = Fold.of(dataclasses.replace(problem, dtype=torch.float16))
    buffer = fold_images(x, layout.shape(layer.batch, out_size(layer)), layer.padding)
    images = layout.images(buffer, out_size(layer))

    like = layout.weight(w)
    sums = weight_gradient(layout.folded(), g, images.contiguous(), like)
    sums = torch.empty_like(like, dtype=torch.float32).copy_(sums)
    exact = weight_gradient(problem, g, x, w)
    for weight in (w, w.contiguous(memory_format=torch.channels_last)):
        back = layout.unfolded(sums, weight)
        assert back.dtype == torch.float32 and back.stride() == torch.empty_like(weight).stride()
        torch.testing.assert_close(back, exact.float(), rtol=1e-5, atol=1e-5)


@given(layer=foldable_layers())
def test_the_way_back_of_each_sum(layer: Conv) -> None:
    """Sums that no weight has are left behind: they are NaN here."""
    layout = Fold.of(problem_of(layer, torch.float32))
    w = torch.randn(layer.neurons, layer.channels, *layer.kernel)
    sums = torch.full_like(layout.weight(w), float("nan"))
    stride_h, rows = layer.stride[0], range(layer.kernel[0])
    for r in rows:
        for s in range(layer.kernel[1]):
            first = s * layout.pixel + r % stride_h * layout.depth
            sums[:, first : first + layer.channels, r // stride_h, 0] = w[:, :, r, s]
    assert torch.equal(layout.unfolded(sums, w), w)


@pytest.mark.parametrize(
    ("problem", "rows", "channels"), [(RESNET, 4, 64), (VGG, 3, 32), (VIT, 1, 768)]
)
def test_first_layers_of_networks(problem: Problem, rows: int, channels: int) -> None:
    folded = Fold.of(problem).folded()
    assert (folded.kernel_size, folded.channels) == ((rows, 1), channels)


def test_the_buffer_of_resnets_first_layer() -> None:
    assert Fold.of(RESNET).shape(256, (112, 112)) == (256, 115, 230, 2, 4)


@pytest.mark.parametrize(
    ("changes", "foldable"),
    [
        ({}, True),
        ({"dilation": (2, 1)}, False),
        ({"dilation": (2, 1), "stride": (1, 2)}, True),
        ({"dilation": (1, 2)}, False),
        ({"dilation": (1, 2), "kernel_size": (3, 1)}, True),
        ({"dilation": (2, 1), "kernel_size": (1, 3)}, True),
        ({"groups": 2}, False),
        ({"channels": 16}, False),
        ({"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0)}, False),
    ],
)
def test_what_is_folded(changes: dict, foldable: bool) -> None:
    assert tiles.folds(dataclasses.replace(RESNET, **changes)) is foldable


def test_offsets_beyond_31_bits_do_not_fit() -> None:
    layout = Fold.of(RESNET)
    assert layout.fits(layout.shape(256, (112, 112)))
    assert not layout.fits(layout.shape(1, (12000, 12000)))
    assert not layout.fits(layout.shape(2**25, (112, 112)))
    many = dataclasses.replace(RESNET, neurons=2**23)
    assert not Fold.of(many).fits(layout.shape(256, (112, 112)))


def test_a_tuner_tries_folded_tiles_where_they_suit() -> None:
    def tried(problem: Problem) -> set[tuple[int, int]]:
        listed = [Tile(*shape, **options) for shape, options in TILES["packed", 16]]
        fit = [tile for tile in listed if not tile.packed and useful(problem, tile)]
        return {(tile.block_k, tile.block_c) for tile in fit}

    assert tried(RESNET) == tried(VGG) == {(64, 64), (64, 32)}
    assert (128, 128) in tried(VIT)
    assert not tried(dataclasses.replace(RESNET, groups=2))
    assert not tried(dataclasses.replace(RESNET, neurons=8)), "a buffer larger than a stored u"


def test_what_the_copy_of_x_holds_is_not_the_splits() -> None:
    tile, device = Tile(64, 64, 64, 4, 3, 3), torch.device("cpu")
    free = splits.split_rows(Fold.of(RESNET).folded(), tile, device)[0]
    stored = RESNET.rows * 64 * 2
    held = stored - 8 * 64 * 256  # leaves room for one part
    assert free > 1 == splits.split_rows(Fold.of(RESNET).folded(held), tile, device)[0]
