"""The tables of tiles: which file serves a GPU, and which of its entries a layer."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import small_tiles
import torch

from ghl_kernels import Problem
from ghl_kernels.tuning import tiles, tune
from ghl_kernels.tuning.tiles import Entry, Table, Tile

TILE = Tile(16, 16, 16, 4, 2)
CPU = torch.device("cpu")
read_table = tiles.table.__wrapped__  # before a fixture replaces it
shipped = pytest.mark.parametrize("name", [path.stem for path in tiles.SHIPPED.glob("*.json")])


def entry(rows: int, neurons: int, columns: int, **others: object) -> Entry:
    known = {"kind": "pointwise", "bits": 16, "strategy": "triton", "tile": TILE}
    return Entry(rows=rows, neurons=neurons, columns=columns, **{**known, **others})


def chosen(
    entries: list[Entry], problem: Problem, monkeypatch, strategy: str | None = None
) -> Entry:
    monkeypatch.setattr(tiles, "table", lambda device: Table("test", None, tuple(entries)))
    return tiles.choose(problem, CPU, strategy)


def linear(rows: int, neurons: int, channels: int, dtype: torch.dtype = torch.float16) -> Problem:
    return Problem(rows, neurons, channels, dtype, linear=True)


def test_a_layer_takes_the_entry_nearest_in_logarithms(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = entry(100, 64, 64), entry(10000, 64, 64)
    for rows, wanted in ((1, small), (900, small), (1100, large), (10**9, large)):
        assert chosen([small, large], linear(rows, 64, 64), monkeypatch) == wanted
    wide, tall = entry(100, 64, 512), entry(100, 512, 64)
    assert chosen([wide, tall], linear(100, 400, 96), monkeypatch) == tall
    assert chosen([wide, tall], linear(100, 96, 400), monkeypatch) == wide
    assert chosen([wide, tall], linear(0, 96, 400), monkeypatch) == wide


@pytest.mark.parametrize(
    ("neurons", "channels", "descriptors", "strategy"),
    [
        (64, 32, False, "triton"),
        (64, 24, False, "library"),
        (24, 64, False, "library"),
        (64, 24, True, "triton"),
        (64, 20, True, "library"),
    ],
)
def test_numbers_that_are_loaded_one_by_one_go_to_the_library(
    neurons: int,
    channels: int,
    descriptors: bool,
    strategy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton loads 16 bytes at once by multiples of 16 numbers, tensor descriptors by 8."""
    only = entry(64, 64, 64)
    only = dataclasses.replace(only, tile=dataclasses.replace(only.tile, descriptors=descriptors))
    assert chosen([only], linear(64, neurons, channels), monkeypatch).strategy == strategy
    wide = linear(64, neurons, channels, torch.float32)
    alike = dataclasses.replace(only, bits=32)
    assert chosen([alike], wide, monkeypatch).strategy == "triton"
    assert chosen([only], linear(64, neurons, channels), monkeypatch, "triton") == only


@pytest.mark.parametrize("strategy", [*tiles.BY_TRITON, *tiles.BY_CUDA])
def test_what_was_measured_of_these_very_sizes_is_taken(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it loads; where it was computed, or for other sizes, the library is."""
    known = entry(64, 20, 36, strategy=strategy)
    monkeypatch.setattr(tiles, "table", lambda device: Table("test", None, (known,)))
    nearest = tiles.nearest
    among = tiles.STRATEGIES
    assert nearest(linear(64, 20, 36), CPU, None, among).strategy == strategy
    other = nearest(linear(63, 20, 36), CPU, None, among)
    assert (other.strategy, other.measured) == ("library", False)
    wide = nearest(linear(64, 24, 40), CPU, None, among).strategy
    assert wide == (strategy if strategy in tiles.BY_CUDA else "library")


def test_only_entries_of_its_kind_and_bits_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """However near another is."""
    alike = entry(10, 10, 10, bits=32)
    others = [entry(64, 64, 64), entry(64, 64, 64, kind="conv", bits=32)]
    problem = linear(64, 64, 64, torch.float32)
    assert chosen([*others, alike], problem, monkeypatch) == alike


def test_a_strategy_restricts_the_entries_if_it_has_any(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = entry(64, 64, 64), entry(9000, 64, 64, strategy="triton_stored")
    problem = linear(64, 64, 64)
    assert chosen([near, far], problem, monkeypatch) == near
    assert chosen([near, far], problem, monkeypatch, "triton_stored") == far
    assert chosen([near], problem, monkeypatch, "triton_stored") == near


def test_patches_want_neurons_that_pay_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written once and read twice, whatever the layer: where nothing else was measured."""
    among = *tiles.BY_TRITON, *tiles.BY_PATCHES
    patches = entry(4096, 64, 64, bits=32, strategy="library_patches")
    library = entry(64, 64, 64, bits=32, strategy="library")
    table = Table("test", None, (patches, library))
    monkeypatch.setattr(tiles, "table", lambda device: table)
    for rows, neurons, wanted in (
        (4096, 64, patches), (4000, 64, library), (4096, 255, library), (4000, 256, patches),
    ):  # fmt: skip
        problem = linear(rows, neurons, 64, torch.float32)
        assert tiles.find(problem, CPU, among=among) == wanted
        alone = tiles.find(problem, CPU, among=tiles.BY_PATCHES)
        assert alone == (patches if wanted == patches else None)


def test_taps_that_do_not_divide_a_kernels_row_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    three = entry(64, 64, 64, kind="conv", tile=dataclasses.replace(TILE, taps=3))
    for width, taps in ((3, 3), (6, 3), (1, 1), (2, 1), (5, 1)):
        problem = Problem(64, 64, 16, torch.float16, (3, width))
        assert chosen([three], problem, monkeypatch).tile.taps == taps


@pytest.mark.parametrize(("neurons", "tile"), [(64, (64, 1)), (72, (128, 2))])
def test_a_block_of_a_cluster_that_had_no_neurons_is_left_out(
    neurons: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_two = Tile(64, 128, 192, 12, 5, packed=True, box=64, cluster=2)
    known = Entry("conv", 16, 4096, 128, 576, "cuda_sm90", of_two)
    monkeypatch.setattr(tiles, "table", lambda device: Table("test", None, (known,)))
    options = {"kernel_size": (3, 3), "padding": (1, 1), "channels_last": True}
    layer = Problem(4096, neurons, 64, torch.bfloat16, **options)
    found = tiles.find(layer, CPU, among=("cuda_sm90",))
    assert found and (found.tile.block_k, found.tile.cluster) == tile


def test_an_entry_in_use_is_taken_by_this_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    used, other = entry(1, 1, 1, strategy="library"), entry(64, 64, 64)
    elsewhere = []
    with tiles.use(used):
        assert chosen([other], linear(64, 64, 64), monkeypatch) == used
        look = threading.Thread(
            target=lambda: elsewhere.append(tiles.choose(linear(64, 64, 64), CPU))
        )
        look.start()
        look.join()
    assert elsewhere == [other]
    assert tiles.choose(linear(64, 64, 64), CPU) == other


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (linear(4, 4, 4), "pointwise"),
        (Problem(4, 4, 4, torch.float16), "pointwise"),
        (Problem(4, 4, 4, torch.float16, stride=(2, 2)), "packed"),
        (Problem(4, 4, 64, torch.float16, stride=(2, 2)), "conv"),
        (Problem(4, 4, 64, torch.float16, padding=(1, 1)), "conv"),
        (Problem(4, 4, 64, torch.float16, groups=2), "conv"),
        (Problem(4, 4, 16, torch.float16, (3, 3)), "conv"),
        (Problem(4, 4, 3, torch.float16, (3, 3)), "packed"),
        (Problem(4, 4, 1, torch.float16, (3, 3)), "packed"),
        (Problem(4, 2, 1, torch.float16, (3, 3), groups=8), "depthwise"),
    ],
)
def test_the_kind_of_kernel_a_layer_needs(problem: Problem, kind: str) -> None:
    assert tiles.kind(problem) == kind


@pytest.mark.parametrize(
    ("problem", "form", "programs"),
    [
        (linear(99, 33, 17), small_tiles.Form(), 3 * 2),
        (Problem(99, 33, 17, torch.float16, (3, 3)), small_tiles.Form(), 3 * 2 * 9),
        (Problem(99, 33, 17, torch.float16, (3, 3)), small_tiles.Form(taps=3), 3 * 2 * 3),
        (Problem(99, 33, 17, torch.float16, (3, 3)), small_tiles.Form(packed=True), 3 * 10),
        (Problem(99, 33, 17, torch.float16, (3, 3), groups=2), small_tiles.Form(), 2 * 3 * 2 * 9),
        (Problem(99, 2, 1, torch.float16, (3, 3), groups=9), small_tiles.Form(), 2 * 3),
    ],
)
def test_the_programs_of_a_split(problem: Problem, form: small_tiles.Form, programs: int) -> None:
    assert tiles.programs(problem, form.tile(tiles.kind(problem))) == programs


@pytest.mark.parametrize(
    ("channels", "tiles_of_columns"), [(32, 5), (64, 5), (72, 9), (128, 9), (130, 14)]
)
def test_columns_in_boxes_of_one_tap(channels: int, tiles_of_columns: int) -> None:
    """Nine taps of one, two or three boxes of up to 64 channels, two boxes to a tile."""
    tile = Tile(64, 128, 128, 12, 4, packed=True, box=64)
    problem = Problem(99, 256, channels, torch.float16, (3, 3))
    assert tiles.programs(problem, tile) == 2 * tiles_of_columns


@shipped
def test_a_shipped_table_serves_every_kind_of_layer(name: str) -> None:
    """In 16 and, where tensor cores may be used, 32 bits, by Triton's own products."""
    table = Table.read(tiles.SHIPPED / f"{name}.json")
    assert {e.strategy for e in table.entries} <= {*tiles.STRATEGIES} - {*tiles.UNPROVEN}
    for kind in small_tiles.KINDS:
        for bits in (16, 32):
            assert any(e.kind == kind and e.bits == bits for e in table.entries), (kind, bits)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU by name and capability, and the folder where its user's tables are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (PCIe)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    folder = tmp_path / "ghl_kernels" / "tables"
    folder.mkdir(parents=True)
    return folder


def written(path: Path, **content: object) -> Path:
    known = {"measured": {"gpu": "here"}, "entries": [dataclasses.asdict(entry(1, 2, 3))]}
    path.write_text(json.dumps({**known, **content}))
    return path


def test_the_users_table_is_preferred_to_the_shipped_one(gpu: Path) -> None:
    assert read_table(CPU).name == "sm90"
    written(gpu / "nvidia-h200-pcie.json")
    table = read_table(CPU)
    assert (table.name, table.measured) == ("nvidia-h200-pcie", {"gpu": "here"})
    assert table.entries[0] == entry(1, 2, 3)


def test_what_a_table_lacks_is_the_architectures(gpu: Path) -> None:
    """Kinds and bits that were not tuned; of those that were, nothing is added."""
    written(gpu / "nvidia-h200-pcie.json")
    known = {(e.kind, e.bits) for e in read_table(CPU).entries}
    shipped = Table.read(tiles.SHIPPED / "sm90.json").entries
    assert known == {(e.kind, e.bits) for e in shipped}
    tuned = [e for e in read_table(CPU).entries if (e.kind, e.bits) == ("pointwise", 16)]
    assert tuned == [entry(1, 2, 3)]
    assert tuned[0].measured
    depthwise = [e for e in read_table(CPU).entries if e.kind == "depthwise"]
    assert depthwise and not any(e.measured for e in depthwise)
    inherited = [e for e in read_table(CPU).entries if e not in tuned]
    assert inherited and not any(e.measured for e in inherited)


def test_a_table_tells_what_of_it_was_measured(tmp_path: Path) -> None:
    entries = [entry(1, 2, 3), entry(4, 5, 6, measured=False)]
    tune.write(tmp_path / "table.json", entries, {"gpu": "here"})
    read = Table.read(tmp_path / "table.json").entries
    assert [e.measured for e in read] == [True, False]


def test_a_gpus_own_shipped_table_is_preferred_to_its_architectures(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path)
    written(tmp_path / "sm90.json")
    assert read_table(CPU).name == "sm90"
    written(tmp_path / "nvidia-h200-pcie.json")
    assert read_table(CPU).name == "nvidia-h200-pcie"


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm100"), ((12, 0), "sm80")],
)
def test_every_architecture_has_a_table(
    capability: tuple[int, int], name: str, gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert read_table(CPU).name == name


@pytest.mark.parametrize(
    "damaged",
    [
        "{",
        "[]",
        "{}",
        '{"measured": null}',
        '{"measured": {}, "entries": []}',
        '{"measured": null, "entries": [{"kind": "conv"}]}',
        '{"measured": null, "entries": [{"tile": {"block_z": 1}}]}',
    ],
)
def test_a_damaged_table_is_said_by_name_and_not_used(gpu: Path, damaged: str) -> None:
    path = gpu / "nvidia-h200-pcie.json"
    path.write_text(damaged)
    with pytest.warns(UserWarning, match=r"not use this table: .*h200-pcie\.json is not a table"):
        assert read_table(CPU).name == "sm90"
    with pytest.raises(ValueError, match=r"nvidia-h200-pcie\.json is not a table of tiles"):
        Table.read(path)
