"""Layers of few channels as layers of many: the copy of x, the products, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import small_tiles as forms
import torch
from cases import LAYOUTS, Conv, assert_pair, problem_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tiles import Form
from test_fold import foldable_layers
from torch import Tensor

from ghl_kernels import Problem, Rule, fold, pairs
from ghl_kernels.dispatch import IMPLEMENTATIONS
from ghl_kernels.fold import Fold
from ghl_kernels.triton.fold import fold_images
from ghl_kernels.tuning import tiles, trial
from ghl_kernels.tuning.tiles import Entry, Table

Use = Callable[[Form], None]
BY_PRODUCTS = ("triton", "triton_stored")

LAYERS = {
    "resnet": Conv(2, 3, (9, 8), 18, (7, 7), (2, 2), (3, 3)),
    "vgg": Conv(2, 3, (5, 6), 18, padding=(1, 1)),
    "patches": Conv(2, 3, (8, 9), 18, (4, 4), (4, 4)),
    "one_channel": Conv(2, 1, (6, 7), 5, (5, 5), padding=(2, 2)),
    "two_channels": Conv(2, 2, (7, 6), 17, (3, 2), (2, 1), (1, 0)),
    "four_channels": Conv(2, 4, (5, 7), 18, (3, 3), (1, 2), (0, 1)),
    "fifteen_channels": Conv(1, 15, (5, 4), 18, (2, 3), padding=(1, 1)),
    "one_row": Conv(2, 3, (4, 6), 18, (1, 3), padding=(0, 1)),
    "one_tap": Conv(3, 3, (5, 7), 6, (1, 1), (2, 2)),
    "strides_of_three": Conv(2, 3, (8, 7), 18, (5, 5), (3, 3), (1, 2)),
    "stride_beyond_the_kernel": Conv(2, 2, (7, 8), 4, (1, 2), (3, 3), (2, 1)),
    "dilated_rows": Conv(2, 3, (7, 5), 18, (3, 3), (1, 1), (2, 1), (2, 1)),
    "more_padding_than_image": Conv(2, 2, (2, 1), 3, (4, 3), padding=(3, 4)),
    "padding_nobody_reads": Conv(1, 3, (1, 1), 3, (1, 1), (8, 8), (3, 3)),
    "one_position": Conv(5, 3, (4, 3), 18, (4, 3)),
}
NOT_FOLDABLE = {
    "dilated_columns": Conv(2, 3, (4, 7), 18, (2, 3), dilation=(1, 2)),
    "dilated_rows_and_strides": Conv(2, 3, (9, 4), 18, (3, 2), (2, 1), dilation=(2, 1)),
    "groups": Conv(2, 6, (5, 4), 14, (3, 3), padding=(1, 1), groups=2),
}


@pytest.fixture(autouse=True)
def folded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fold]]:
    """The folds of the layers that were folded."""
    taken: list[Fold] = []

    def images(self: Fold, *arguments: object) -> Tensor:
        taken.append(self)
        return own(self, *arguments)

    own = Fold.images
    monkeypatch.setattr(Fold, "images", images)
    yield taken


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_folded_pair_is_the_references(
    layer: Conv, forced: Callable, use: Use, folded: list[Fold]
) -> None:
    """In many tiles and splits, in one, and of a stored u; x and w in both memory orders."""
    for number, (name, form, dtype, order) in enumerate((
        ("triton", forms.FOLDED, torch.float16, (False, True)),
        ("triton", forms.FOLDED_WHOLE_ROWS, torch.float32, (True, False)),
        ("triton_stored", forms.FOLDED, torch.float32, (True, True)),
    )):  # fmt: skip
        tensors = layer.tensors(dtype)
        for argument, last in enumerate((order[0], *[name == "triton"] * 2, order[1])):
            if last:
                t = tensors[argument].contiguous(memory_format=torch.channels_last)
                tensors[argument] = t
        use(form)
        with forced(name):
            assert_pair(layer, tensors)
        assert len(folded) == number + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, forced: Callable, use: Use, folded: list[Fold]) -> None:
    """NaN in every gap between the numbers of x, or of w."""
    use(forms.FOLDED)
    layer = LAYERS["two_channels"]
    with forced("triton"):
        for argument in (0, 3):
            tensors = layer.tensors(torch.float16)
            tensors[argument] = LAYOUTS[layout](tensors[argument])
            assert_pair(layer, tensors)
    assert len(folded) == 2


@pytest.mark.parametrize("name", BY_PRODUCTS)
@pytest.mark.parametrize("layer", NOT_FOLDABLE.values(), ids=NOT_FOLDABLE)
def test_what_cannot_be_folded_is_gathered(
    layer: Conv, name: str, forced: Callable, use: Use, folded: list[Fold]
) -> None:
    use(forms.FOLDED)
    with forced(name):
        assert_pair(layer, layer.tensors())
    assert not folded


def test_what_is_too_large_folded_is_gathered(
    forced: Callable, use: Use, folded: list[Fold], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(forms.FOLDED)
    layer = LAYERS["vgg"]
    monkeypatch.setattr(fold.layout, "LARGEST_SIZE", 100)
    with forced("triton"):
        assert_pair(layer, layer.tensors())
    assert not folded


@pytest.mark.parametrize("name", BY_PRODUCTS)
def test_a_trial_folds(name: str, use: Use, folded: list[Fold], monkeypatch) -> None:
    use(forms.FOLDED)
    monkeypatch.setattr(trial, "BATCH", 2)
    monkeypatch.setattr(trial, "SIZE", 5)
    device = torch.get_default_device()
    problem = problem_of(LAYERS["two_channels"], torch.float32)
    assert trial.disagreement(problem, device, IMPLEMENTATIONS[name]) is None
    assert len(folded) == 1


def test_a_form_is_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that cannot be folded takes an entry that is gathered, however near another is."""
    layers = LAYERS["patches"], NOT_FOLDABLE["dilated_columns"]
    can, cannot = (problem_of(layer, torch.float16) for layer in layers)
    sizes = cannot.rows, cannot.neurons, cannot.columns
    tile = dataclasses.replace(forms.FOLDED.tile("packed"), taps=3)
    near = Entry("packed", 16, *sizes, "triton", tile)
    far = Entry("packed", 16, 10**6, 512, 512, "triton", forms.ONE_SPLIT.tile("packed"))
    device = torch.device("cpu")
    for entries, instead in (((near, far), far), ((near,), near)):
        table = Table("made up", None, entries)
        monkeypatch.setattr(tiles, "table", lambda device, table=table: table)
        taken = tiles.choose(can, device)
        assert (taken.rows, taken.tile) == (near.rows, dataclasses.replace(tile, taps=1))
        other = tiles.choose(cannot, device)
        assert other.tile.packed and other.rows == instead.rows


@settings(max_examples=30)
@given(layer=foldable_layers(), layout=st.sampled_from(list(LAYOUTS)))
def test_the_copy_is_that_of_pytorchs_operators(layer: Conv, layout: str) -> None:
    problem = problem_of(layer, torch.float16)
    x = LAYOUTS[layout](layer.tensors(torch.float16)[0])
    shape = Fold.of(problem).shape(layer.batch, (layer.positions[0], layer.positions[1]))
    padding = list(layer.padding)
    assert torch.equal(fold_images(x, shape, padding), fold.fold_images(x, shape, padding))


def test_a_copy_of_rows_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghl_kernels.triton.fold.LARGEST_BLOCK", 32)
    layer = LAYERS["resnet"]
    x = layer.tensors()[0]
    shape = Fold.of(problem_of(layer, x.dtype)).shape(2, (5, 4))
    assert torch.equal(fold_images(x, shape, (3, 3)), fold.fold_images(x, shape, (3, 3)))


def test_a_folds_workspace_is_counted(
    forced: Callable, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The splits' sums get what the copy of x leaves of the memory of a stored u."""
    use(Form(folded=True, splits=None))
    held: list[int] = []
    own = pairs.Partials.empty

    def empty(problem: Problem, *arguments: Any) -> pairs.Partials:
        held.append(problem.held)
        return own(problem, *arguments)

    monkeypatch.setattr(pairs.Partials, "empty", empty)
    layer = LAYERS["vgg"]
    with forced("triton"):
        layer.pair(layer.tensors(torch.float16), Rule())
    problem = problem_of(layer, torch.float16)
    shape = Fold.of(problem).shape(2, (5, 6))
    assert held == [2 * torch.Size(shape).numel()]
