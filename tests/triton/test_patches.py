"""Patches of x along the rows, and sums of their products part after part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import small_tiles as forms
import torch
import torch.nn.functional as F
from cases import (
    LAYOUTS,
    Conv,
    Layer,
    Linear,
    assert_near,
    assert_pair,
    largest,
    magnitudes,
    problem_of,
    wide,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpu import LARGE, assert_pair_in_parts, gpu, random_half, shapes_of, skip_on_a_small_gpu
from test_pair import convolutions
from test_pair_by_triton import LAYERS

import ghl_kernels
from ghl_kernels import Rule, dispatch
from ghl_kernels.rule import CHOICES
from ghl_kernels.triton import library_patches
from ghl_kernels.triton.patches import empty_patches, lay_patches
from ghl_kernels.tuning import tiles, trial

DENSE = {name: one for name, one in LAYERS.items() if getattr(one, "groups", 1) == 1}


@pytest.fixture(autouse=True)
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of layers as small as those of tests."""
    monkeypatch.setattr(library_patches, "FEWEST_ROWS", 1)
    monkeypatch.setattr(tiles, "OF_PATCHES", dataclasses.replace(tiles.OF_PATCHES, block_m=4))


@pytest.fixture
def by_patches(forced: Callable) -> Iterator[None]:
    with forced("library_patches"):
        yield


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has so many rows laid at once, of any layer."""

    def use(rows: int) -> None:
        monkeypatch.setattr(library_patches, "rows_at_once", lambda p, splits: min(rows, p.rows))

    return use


@pytest.mark.usefixtures("by_patches")
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layer", DENSE.values(), ids=DENSE)
def test_pair_is_the_references(
    layer: Layer, order: torch.memory_format, at_once: Callable
) -> None:
    """Of all rows at once, and of a few, the last of them fewer, shared by several splits."""
    tensors = layer.tensors()
    if isinstance(layer, Conv):
        tensors = [t.contiguous(memory_format=order) for t in tensors]
    assert_pair(layer, tensors)
    for rows in (13, 1):
        at_once(rows)
        assert_pair(layer, tensors)


@pytest.mark.usefixtures("by_patches")
@pytest.mark.parametrize("form", [forms.ONE_SPLIT, forms.MANY_SPLITS], ids=["one", "many"])
@pytest.mark.parametrize("competition", CHOICES["competition"])
def test_every_competition(competition: str, form: forms.Form, use: Callable) -> None:
    use(form)
    for layer in (Linear(70, 17, 20), Conv(3, 5, (4, 9), 20, (1, 3))):
        assert_pair(layer, layer.tensors(), Rule(competition=competition, tau=0.7))


@pytest.mark.usefixtures("by_patches")
def test_sums_of_u_are_there_where_they_are_asked_for(at_once: Callable) -> None:
    layer = Conv(2, 5, (6, 4), 20)
    x, y, g, w = layer.tensors()
    u = torch.softmax(y, 1)
    for rows in (16, 5):
        at_once(rows)
        pair = torch.ops.ghl_kernels.conv2d_pair
        totals = pair(x, y, g, w, *layer.geometry, "softmax", 1.0, totals="sums")[2]
        torch.testing.assert_close(totals[:-1], u.sum((0, 2, 3)))
        assert totals[-1] == 16


@pytest.mark.usefixtures("by_patches")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, at_once: Callable) -> None:
    """NaN in every gap between the numbers of one argument."""
    at_once(11)
    layer = DENSE["conv_padded"]
    for argument in range(4):
        tensors = layer.tensors()
        tensors[argument] = LAYOUTS[layout](tensors[argument])
        assert_pair(layer, tensors)


@pytest.mark.usefixtures("by_patches")
@settings(max_examples=10)
@given(
    layer=convolutions().filter(lambda one: one.groups == 1),
    rows=st.integers(1, 40),
    parts=st.sampled_from([1, 3]),
)
def test_convolution_of_any_shape(layer: Conv, rows: int, parts: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library_patches, "rows_at_once", lambda p, splits: min(rows, p.rows))
        forms.Form(splits=parts).use(patch)
        assert_pair(layer, layer.tensors())


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [3, 35])
def test_patches_are_those_of_unfold(channels: int, channels_last: bool) -> None:
    """Any part of the rows, in both orders of columns; and zeros beyond them."""
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    layer = Conv(2, channels, (9, 8), 4, **options)
    x, problem = layer.tensors()[0], problem_of(layer, torch.float32)
    unfolded = F.unfold(x, (3, 3), **options)
    if channels_last:
        unfolded = unfolded.unflatten(1, (channels, 9)).transpose(1, 2).flatten(1, 2)
    wanted = unfolded.movedim(1, 0).flatten(1)
    for first, rows in ((0, problem.rows), (37, 20)):
        patches = empty_patches(rows + 7, problem, x).fill_(float("nan"))
        lay_patches(patches, x, first, rows, problem, layer.positions, channels_last)
        assert torch.equal(patches[:, :rows], wanted[:, first : first + rows])
        assert torch.count_nonzero(patches[:, rows:]) == 0 and patches.stride(0) % 16 == 0


@pytest.mark.parametrize("splits", [1, 11])
@pytest.mark.parametrize(
    ("rows", "neurons", "channels", "most"),
    [
        (262144, 384, 96, 262144 * 384 // 4),
        (65536, 1536, 384, 65536 * 1536 // 4),
        (10**6, 512, 512, library_patches.LARGEST),
        (50176, 256, 256, library_patches.SMALLEST),
        (10**7, 8, 64, 10**7 * 8 // 4),
        (64, 4096, 2787, library_patches.SMALLEST),
    ],
)
def test_rows_are_in_equal_parts_of_not_too_many_numbers(
    rows: int, neurons: int, channels: int, most: int, splits: int
) -> None:
    problem = problem_of(Conv(1, 1, (5, 5), 1, padding=(1, 1)), torch.float32)
    problem = dataclasses.replace(problem, rows=rows, neurons=neurons, channels=channels)
    at_once = library_patches.rows_at_once(problem, splits)
    assert at_once % (16 * splits) == 0 or at_once == rows
    assert (at_once - 16 * splits) * problem.columns < most
    parts = -(-rows // at_once)
    assert parts == 1 or at_once * problem.columns > most / 2
    assert rows - (parts - 1) * at_once > at_once - parts * 16 * splits


def test_few_rows_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into products that are not worth it; parts without any are zeros."""
    monkeypatch.setattr(library_patches, "FEWEST_ROWS", 20)
    signal, patches = torch.randn(47, 6), torch.randn(9, 48)
    sums = torch.full((5, 6, 9), float("nan"))
    for beta in (0, 1):
        library_patches.multiply(sums, signal, patches, beta)
    torch.testing.assert_close(sums.sum(0), 2 * signal.T @ patches[:, :47].T)
    assert [bool(part.any()) for part in sums] == [True, True, False, False, False]


@pytest.mark.parametrize("competition", CHOICES["competition"])
def test_its_trial_agrees(competition: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for layer in (Linear(9, 20, 18), Conv(1, 5, (4, 4), 20, (1, 3), (1, 2))):
        problem = problem_of(layer, torch.float32)
        problem = dataclasses.replace(problem, competition=competition, sum_u=True)
        module = dispatch.IMPLEMENTATIONS["library_patches"]
        assert trial.disagreement(problem, device, module, merged=True) is None


@pytest.mark.usefixtures("by_patches")
def test_an_empty_batch_sums_to_zero() -> None:
    x, y, g, w = DENSE["conv_padded"].tensors()
    sums = DENSE["conv_padded"].pair((x[:0], y[:0], g[:0], w), Rule())
    assert [torch.count_nonzero(t).item() for t in sums] == [0, 0, 0]


@pytest.mark.usefixtures("by_patches")
def test_nan_and_infinity_stay_with_whom_they_touch() -> None:
    """A patch that holds NaN makes its columns NaN, and what is written first is nothing's."""
    layer = Conv(2, 3, (4, 4), 5, padding=(1, 1))
    x, y, g, w = layer.tensors()
    x[0, 1, 0, 0] = float("nan")
    G, H0, _ = layer.pair((x, y, g, w), Rule())
    assert G[:, 1].isnan().any() and H0[:, 1].isnan().any()
    assert not G[:, [0, 2]].isnan().any() and not H0[:, [0, 2]].isnan().any()


@pytest.mark.usefixtures("by_patches")
def test_the_same_result_twice(at_once: Callable) -> None:
    at_once(9)
    layer = DENSE["conv_strided"]
    tensors = layer.tensors()
    first, again = (layer.update(tensors, Rule()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("layer", "dtype", "reason"),
    [
        (Linear(9, 8, 7), torch.float16, "of float32 numbers, not torch.float16"),
        (Conv(1, 4, (5, 5), 4, groups=2), torch.float32, "of one group, not of 2"),
    ],
    ids=["16 bits", "groups"],
)
def test_what_it_is_not_for_is_refused(layer: Layer, dtype: torch.dtype, reason: str) -> None:
    with (
        ghl_kernels.force("library_patches"),
        pytest.raises(RuntimeError, match=f"library_patches is forced.*{reason}"),
    ):
        layer.pair(layer.tensors(dtype), Rule())


@pytest.mark.parametrize("form", [forms.ONE_SPLIT, forms.MANY_SPLITS], ids=["one", "many"])
def test_a_tape_of_it_is_played(
    form: forms.Form,
    use: Callable,
    at_once: Callable,
    played: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products that add to results, or to parts of the workspace, among its steps."""
    use(form)
    at_once(15)
    taken = dispatch.Backend("library_patches", "measured")
    monkeypatch.setattr(dispatch, "settled", lambda *_: taken)
    layer = DENSE["conv_padded"]
    for _ in range(4):
        tensors = layer.tensors()
        found = layer.pair(tensors, Rule())
        with ghl_kernels.force("library_patches"):
            wanted = layer.pair(tensors, Rule())
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert "Played" in {type(one).__name__ for one in played.values()}


def test_rows_are_split_by_programs_as_large_as_cublas_has() -> None:
    problem = problem_of(Conv(1, 96, (16, 16), 384, padding=(1, 1)), torch.float32)
    tile = library_patches.tile_of(problem, torch.empty(0))
    assert tiles.programs(problem, tile) == 3 * 4


@gpu
@pytest.mark.parametrize("parts", [1, 3])
def test_tf32_is_as_near_as_pytorchs(parts: int, forced: Callable, use: Callable) -> None:
    """At most twice what PyTorch's own products lose, by several parts of the rows."""
    use(forms.Form(splits=parts))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for layer in (
        Linear(50_001, 100, 130),
        Conv(40, 64, (16, 15), 200, padding=(1, 1)),
        Conv(30, 35, (31, 30), 70, (3, 2), (2, 1), (1, 0), (1, 2)),
    ):
        tensors = layer.tensors()
        exact, size = layer.reference(wide(tensors), Rule()), magnitudes(layer, tensors, Rule())
        with ghl_kernels.force("composed"):
            natural = layer.pair(tensors, Rule())
        with forced("library_patches"):
            pair = layer.pair(tensors, Rule())
        for name in ("G", "H0"):
            number = ("G", "H0").index(name)
            wanted, scale = getattr(exact, name), largest(getattr(size, name))
            assert_near(name, pair[number], wanted, natural[number], scale)


@gpu
def test_more_than_two_billion_numbers(shipped: None, forced: Callable) -> None:
    layer = LARGE["linear"]
    skip_on_a_small_gpu()
    x, y, g, w = (random_half(shape).float() for shape in shapes_of(layer))
    x[-(x.shape[0] // 100) :] *= 10
    with forced("library_patches"):
        assert_pair_in_parts(layer, (x, y, g, w), parts=64)


@pytest.mark.parametrize("rows", [1, 7, 30, 64])
@pytest.mark.parametrize("parts", [1, 3, 5])
def test_products_are_shared_by_splits(rows: int, parts: int) -> None:
    """Each has its share, at multiples of four rows, and the first what is left."""
    signal, patches = torch.randn(rows, 6), torch.randn(9, 80)
    sums = torch.full((parts, 6, 9), float("nan"))
    library_patches.multiply(sums, signal, patches, beta=0)
    wanted = signal.T @ patches[:, :rows].T
    torch.testing.assert_close(sums.sum(0), wanted)
    library_patches.multiply(sums, signal, patches, beta=1)
    torch.testing.assert_close(sums.sum(0), 2 * wanted)
