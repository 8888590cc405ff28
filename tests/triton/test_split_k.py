"""How rows are split, and that the splits' sums are added in one order and without a trace."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from cases import Conv, Layer, Linear, assert_pair, largest, magnitudes
from hypothesis import given
from hypothesis import strategies as st
from small_tiles import Form

from ghl_kernels import Problem, Rule
from ghl_kernels import splits as dividing
from ghl_kernels.problem import dot_precision
from ghl_kernels.triton import split_k
from ghl_kernels.tuning.tiles import Tile
from ghl_kernels.tuning.tiles import programs as count_programs

LAYERS: dict[str, Layer] = {
    "linear": Linear(140, 17, 18),
    "conv": Conv(5, 16, (6, 6), 18, kernel=(1, 2)),
    "packed": Conv(20, 3, (5, 6), 18, kernel=(2, 2)),
    "depthwise": Conv(5, 4, (5, 6), 4, kernel=(2, 2), groups=4),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
own_choice = dividing.split_rows  # before a fixture replaces it


@layers
def test_any_number_of_splits_agrees_to_rounding(
    layer: Layer, fused: None, use: Callable[[Form], None]
) -> None:
    """And the same number to the last bit."""
    tensors, rule = layer.tensors(), Rule()
    scale = magnitudes(layer, tensors, rule)
    results = {}
    for splits in (1, 2, 9):
        use(Form(block_k=32, block_c=32, splits=splits))
        results[splits] = layer.pair(tensors, rule)
    assert all(map(torch.equal, results[splits], layer.pair(tensors, rule)))
    for one, other in itertools.combinations(results.values(), 2):
        for a, b, most in zip(one[:2], other[:2], (scale.G, scale.H0), strict=True):
            assert largest(a - b) <= 4 * torch.finfo(torch.float32).eps * largest(most)
        torch.testing.assert_close(one[2], other[2])


def test_more_splits_than_are_added_at_once(
    fused: None, use: Callable[[Form], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_k, "MOST_SPLITS_AT_ONCE", 2)
    use(Form(splits=5))
    assert_pair(LAYERS["linear"], LAYERS["linear"].tensors())


@layers
def test_the_kernels_own_choice_splits_and_is_right(
    layer: Layer, fused: None, use: Callable[[Form], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the limits of a small layer; what is left is the number of processors."""
    monkeypatch.setattr(dividing, "FEWEST_BLOCKS", 1)
    chosen = []

    def record(*arguments: object) -> tuple[int, int]:
        chosen.append(own_choice(*arguments))
        return chosen[-1]

    monkeypatch.setattr(dividing, "split_rows", record)
    use(Form(splits=None))
    assert_pair(layer, layer.tensors())
    assert chosen[0][0] > 1


@given(
    rows=st.integers(1, 2**31 - 2**16),
    neurons=st.integers(1, 5000),
    channels=st.integers(1, 5000),
    block_m=st.sampled_from([16, 32, 64, 128]),
    programs=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    processors=st.sampled_from([4, 108, 132]),
)
def test_splits_cover_the_rows_and_none_is_empty(
    rows: int, neurons: int, channels: int, block_m: int, programs: int, dtype: torch.dtype,
    processors: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Their workspace is never larger than the u that PyTorch's composition stores."""
    monkeypatch.setattr(dividing, "processors", lambda device: processors)
    problem = Problem(rows, neurons, channels, dtype, linear=True)
    tile = Tile(block_m, 64, 64, 4, 3, programs)
    splits, each = own_choice(problem, tile, torch.device("cpu"))
    assert each % block_m == 0
    assert (splits - 1) * each < rows <= splits * each
    if splits > 1:
        assert splits * 2 * 4 * neurons * channels <= rows * neurons * dtype.itemsize


@given(
    rows=st.integers(1, 2**20),
    neurons=st.integers(1, 3000),
    channels=st.integers(1, 700),
    taps=st.integers(1, 3),
    programs=st.integers(1, 2),
    boxes=st.integers(2, 4),
    cluster=st.integers(1, 2),
)
def test_tiles_of_boxes_are_strung_together_where_they_fill_a_gpu_unevenly(
    rows: int, neurons: int, channels: int, taps: int, programs: int, boxes: int, cluster: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As csrc/cuda/sm90_schedule.h cuts them: parts enough, within the memory of u."""
    monkeypatch.setattr(dividing, "processors", lambda device: 132)
    geometry = {"kernel_size": (taps, taps), "padding": (1, 1), "channels_last": True}
    problem = Problem(rows, neurons, channels, torch.float16, linear=False, **geometry)
    tile = Tile(
        64, 64 * cluster, 64 * boxes, 12, 4, programs, packed=True, box=64, cluster=cluster
    )  # fmt: skip
    parts, each = own_choice(problem, tile, torch.device("cpu"))
    blocks, share = -(-rows // 64), each // 64
    assert each % 64 == 0 and parts >= -(-blocks // share)
    if parts == -(-blocks // share):
        return
    whole, rest = divmod(blocks, share)
    tiles = count_programs(problem, tile)
    most = max(
        ((number + 1) * rest - 1) // share - number * rest // share + 1
        for number in range(min(tiles, 2000))
    )
    assert rest > 0 and whole > 0 and whole + most <= parts
    assert parts * 8 * neurons * problem.columns <= rows * neurons * 2
    assert cluster * (tiles * whole + -(-tiles * rest // share)) <= 132 * programs


def test_a_layer_that_is_strung_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """36 tiles for 132 multiprocessors: 3 whole shares of each, and 24 take what is left."""
    monkeypatch.setattr(dividing, "processors", lambda device: 132)
    layer = Problem(
        256 * 14 * 14, 256, 256, torch.bfloat16, linear=False, kernel_size=(3, 3),
        padding=(1, 1), channels_last=True,
    )  # fmt: skip
    tile = Tile(64, 64, 256, 12, 4, packed=True, box=64)
    assert own_choice(layer, tile, torch.device("cpu")) == (5, 214 * 64)
    cluster = dataclasses.replace(tile, block_k=128, cluster=2)  # 18 tiles for 66 clusters
    assert own_choice(layer, cluster, torch.device("cpu")) == (5, 214 * 64)
    wide = dataclasses.replace(layer, neurons=512, channels=512)
    assert own_choice(wide, tile, torch.device("cpu")) == (1, 784 * 64)  # nothing but rests


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_products_do_not_ask_about_tf32(dtype: torch.dtype) -> None:
    assert dot_precision(Problem(8, 8, 8, dtype)) == "tf32"


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_products_are_as_torch_backends_allows(precision: str) -> None:
    """Matrix products and convolutions have each a switch of their own."""
    for linear, products in (
        (True, torch.backends.cuda.matmul),
        (False, torch.backends.cudnn.conv),
    ):
        problem = Problem(8, 8, 8, torch.float32, linear=linear)
        other = Problem(8, 8, 8, torch.float32, linear=not linear)
        products.fp32_precision = precision
        assert dot_precision(problem) == precision
        assert dot_precision(other) == "ieee"
        products.fp32_precision = "ieee"
