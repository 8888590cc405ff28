"""What the tuner tries, what it keeps, and the table that it leaves; timing is made up."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ghl.bench import compiling, tuning
from ghl.bench.clock import WallClock
from ghl.bench.compiling import Job, compile_all, compiled_alike
from ghl.bench.layers import Layer, layers_of
from ghl.bench.tuning import Tuned, layers_to_tune, tune_layers
from ghl.cli import WORKLOADS
from ghl_kernels import Problem, dispatch
from ghl_kernels.triton import fused, stored
from ghl_kernels.tuning import tiles, tune
from ghl_kernels.tuning.tiles import Entry, Table, Tile
from ghl_kernels.tuning.tune import Attempt

SHIPPED = Table.read(tiles.SHIPPED / "sm90.json")
HALF = Table("16 bits", None, tuple(e for e in SHIPPED.entries if e.bits == 16))
SMALL = Tile(64, 64, 64, 4, 3, 3)
MEASURED = {"gpu": "a GPU", "date": "today"}


def problem(rows: int = 4096, neurons: int = 64, channels: int = 64, side: int = 1) -> Problem:
    return Problem(rows, neurons, channels, torch.bfloat16, (side, side))


def entry(strategy: str, rows: int = 4096) -> Entry:
    return Entry("pointwise", 16, rows, 64, 64, strategy, SMALL)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("mode", ["bfloat16", "tf32"])
def test_every_layer_has_candidates_that_suit_it(workload: str, mode: str) -> None:
    for layer in layers_of(workload):
        found = tuning.problem_of(layer, mode)
        tried = tune.candidates(found)
        assert {e.strategy for e in tried} == set(tiles.BY_TRITON), layer
        assert sum(e.strategy == "library" for e in tried) == 1
        assert all(found.kernel_size[1] % e.tile.taps == 0 for e in tried)
        assert all(e.distance(found) == 0 for e in tried)
        assert len(tried) == len(set(tried))


def test_what_a_layer_takes_now_is_tried_first() -> None:
    present = Entry("pointwise", 16, 1, 1, 1, "triton_stored", Tile(16, 16, 16, 4, 1))
    tried = tune.candidates(problem(), present)
    assert (tried[0].strategy, tried[0].tile, tried[0].rows) == (
        "triton_stored",
        present.tile,
        4096,
    )


def test_the_tiles_of_a_table_are_tried_as_well() -> None:
    odd = Entry("pointwise", 16, 1, 1, 1, "triton", Tile(48, 64, 64, 4, 3))
    other = Entry("conv", 16, 1, 1, 1, "triton", Tile(80, 64, 64, 4, 3))
    tried = {e.tile for e in tune.candidates(problem(), None, [odd, other])}
    assert odd.tile in tried
    assert other.tile not in tried


def test_compiled_tiles_are_tried_beside_tritons_and_alone() -> None:
    tile = Tile(32, 64, 64, 4, 4, packed=True)
    present, compiled = entry("cuda"), [(strategy, tile) for strategy in tiles.BY_CUDA]
    tried = tune.candidates(problem(), present, [entry("cuda_sm90")], compiled)
    assert tuple(e.strategy for e in tried[-4:]) == tiles.BY_CUDA
    assert {e.strategy for e in tried} == {*tiles.BY_TRITON, *tiles.BY_CUDA}
    assert all(e.tile == tile for e in tried[1:] if e.strategy in tiles.BY_CUDA)
    alone = tune.candidates(problem(), present, [], compiled, by_triton=())
    assert [e.strategy for e in alone] == ["cuda", *tiles.BY_CUDA]


def test_tiles_larger_than_the_layer_or_the_memory_are_left_out() -> None:
    found = problem(neurons=64, channels=64)
    assert tune.useful(found, SMALL)
    assert not tune.useful(found, Tile(64, 128, 64, 8, 3))
    assert not tune.useful(found, Tile(64, 64, 128, 8, 3))
    assert not tune.useful(problem(neurons=512, channels=512), Tile(128, 128, 128, 8, 4))
    assert not tune.useful(problem(side=4), Tile(64, 64, 64, 8, 3, taps=3))


def test_a_candidate_that_fails_is_dropped_and_told() -> None:
    def measure(e: Entry) -> float:
        if e.strategy == "triton":
            raise RuntimeError("wrong: H0 is off\nand more")
        return {"triton_stored": 2.0, "library": 1.0}[e.strategy]

    tried = [entry(s) for s in tiles.BY_TRITON]
    attempts = tune.attempt_all(tried, measure, float("inf"))
    assert attempts[0].dropped == "RuntimeError: wrong: H0 is off"
    assert [a.entry.strategy for a in tune.best(attempts)] == ["library", "triton_stored"]


def test_after_the_deadline_only_the_first_is_tried() -> None:
    tried = [entry(s) for s in tiles.BY_TRITON]
    assert len(tune.attempt_all(tried, lambda e: 1.0, time.monotonic() - 1)) == 1


def test_the_fastest_comes_first_and_is_what_a_layer_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = [Attempt(entry("triton"), 3.0), Attempt(entry("library"), 1.0),
                Attempt(entry("triton_stored"), 2.0)]  # fmt: skip
    path = tmp_path / "new" / "a-gpu.json"
    tune.write(path, [a.entry for a in tune.best(attempts)], MEASURED, merges="cuda")
    table = Table.read(path)
    assert table.measured == MEASURED and table.merges == "cuda"
    monkeypatch.setattr(tiles, "table", lambda device: table)
    monkeypatch.setattr(tiles, "nearest", tiles.nearest.__wrapped__)
    cpu = torch.device("cpu")
    assert tiles.choose(problem(), cpu).strategy == "library"
    assert tiles.choose(problem(), cpu, "triton").strategy == "triton"


def test_a_table_keeps_what_was_not_tuned(tmp_path: Path) -> None:
    """A kind or a dtype without any entry could not be looked up."""
    first = SHIPPED.entries[0]
    tuned = Entry(
        first.kind, first.bits, first.rows, first.neurons, first.columns, "library", SMALL
    )
    tune.write(tmp_path / "t.json", tune.merged(SHIPPED.entries, [tuned]), MEASURED)
    table = Table.read(tmp_path / "t.json")
    others = [
        e for e in SHIPPED.entries if (tune.sizes(e), e.strategy) != (tune.sizes(tuned), "library")
    ]
    assert table.entries == (tuned, *others)
    assert any(tune.sizes(e) == tune.sizes(tuned) for e in others), "by other strategies"
    assert os.listdir(tmp_path) == ["t.json"]


def test_layers_of_equal_sizes_take_what_is_fastest_for_all(tmp_path: Path) -> None:
    """A table cannot tell them apart: a slow layer's choice must not be a fast one's loss."""
    layers = [(1.0, 1.1, 0.5), (4.0, 3.0, None)]
    tuned = []
    for times in layers:
        entries = (entry(name) for name in ("triton", "library", "cuda"))
        attempts = (Attempt(e, ms) for e, ms in zip(entries, times, strict=True))
        tuned.append(Tuned(*LAYERS[0], tuple(attempts)))
    assert tuning.choices(tuned) == [entry("library"), entry("triton")]
    assert tuning.choices(tuned[:1]) == [entry("cuda"), entry("triton"), entry("library")]


def test_a_failed_write_leaves_the_table_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    tune.write(path, [entry("triton")], MEASURED)
    before = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        tune.write(path, [entry("library")], MEASURED)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["t.json"]


LAYERS = [(Layer(f"layer{i}", 64, 32, 32 * i, linear=True), "bfloat16") for i in (1, 2, 3)]


def test_layers_share_the_time_and_an_interruption_keeps_the_rest() -> None:
    shares: list[float] = []
    saved: list[int] = []

    def attempt(
        layer: Layer, mode: str, entries: Sequence[Entry], until: float
    ) -> Sequence[Attempt]:
        if layer.name == "layer3":
            raise KeyboardInterrupt
        shares.append(until - time.monotonic())
        return [Attempt(entries[0], 1.0)]

    tuned = tune_layers(LAYERS, attempt, tune.candidates, 30, lambda t: saved.append(len(t)))
    assert [t.layer.name for t in tuned] == ["layer1", "layer2"]
    assert saved == [1, 2]
    assert shares == pytest.approx([20, 30], abs=1)


def test_a_line_tells_the_gain_over_the_present_choice() -> None:
    layer, mode = LAYERS[0]
    won = Tuned(layer, mode, (Attempt(entry("triton"), 3.0), Attempt(entry("library"), 1.5)))
    assert " 2.00x library" in won.line()
    lost = Tuned(layer, mode, (Attempt(entry("triton"), None, "no"),))
    assert lost.line().endswith("nothing ran: no")


def test_a_layer_of_two_workloads_is_tuned_once() -> None:
    twice = layers_to_tune(["vit_b16_b256", "vit_b16_b256"])
    assert len(twice) == 5 and {mode for _, mode in twice} == {"bfloat16"}
    wanted = layers_to_tune(["vit_b16_b256"], ["tf32", "bfloat16"])
    assert [mode for _, mode in wanted] == ["tf32"] * 5 + ["bfloat16"] * 5


def outcome(job: Job) -> str | None:
    """Compiles in another process, as far as that process knows."""
    name = job[0].name
    if name == "layer2":
        os._exit(1)
    return "no" if name == "layer1" else None


def test_a_crash_costs_only_its_own_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MOST_PROCESSES", 1)
    monkeypatch.setattr(compiling, "START", "fork")  # importing torch anew takes seconds
    jobs = [(layer, mode, entry("triton", n)) for n, (layer, mode) in enumerate(LAYERS)]
    jobs = [(a, b, Entry("pointwise", 16, 1, 64, 64, "triton", Tile(16 * n + 16, 16, 16, 4, 2)))
            for n, (a, b, _) in enumerate(jobs)]  # fmt: skip
    failed = compile_all(jobs, 60, outcome)
    assert failed == {
        compiled_alike(*jobs[0]): "no",
        compiled_alike(*jobs[1]): "the compiler or the GPU ended the process",
    }


def hangs(job: Job) -> str | None:
    time.sleep(60 if job[2].strategy == "cuda_sm90" else 0)
    return None


def test_a_compiled_kernel_that_never_ends_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "START", "fork")
    monkeypatch.setattr(compiling, "MOST_PROCESSES", 1)
    jobs = [(*LAYERS[0], entry(strategy)) for strategy in ("cuda", "triton", "cuda_sm90")]
    assert compile_all(jobs, 3, hangs) == {compiled_alike(*jobs[2]): "no answer in time"}


def test_the_whole_tuner_on_a_small_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With interpreted kernels: tries, checks, drops what is wrong, and writes after each layer."""
    if not dispatch.interpreted():
        pytest.skip("there is a GPU: `ghl bench tune` is run there")
    layer = Layer("small", 24, 10, 12, linear=True)
    good, bad = ((16, 16, 16, 4, 1, 1), {}), ((16, 16, 16, 4, 1, 0), {})
    monkeypatch.setitem(tune.TILES, ("pointwise", 32), (good, bad))
    monkeypatch.setattr(tuning, "layers_to_tune", lambda *_: [(layer, "float32")])
    monkeypatch.setattr(tuning, "compile_all", lambda jobs, seconds: {})
    monkeypatch.setattr(tiles, "table", functools.cache(lambda device: HALF))
    present = Entry("pointwise", 32, 1, 1, 1, "library", Tile(*good[0]))
    monkeypatch.setattr(tuning.tiles, "find", find_or(present))
    monkeypatch.setattr(tuning, "fastest_merges", lambda clock: "triton")

    def wrong_for_bad(pair: Callable[..., Any], *arguments: Any) -> tuple[torch.Tensor, ...]:
        G, H0, totals = pair(*arguments)
        entry = tiles.used()
        return 2 * G if entry and entry.tile.programs == 0 else G, H0, totals

    for module in (fused, stored):
        monkeypatch.setattr(module, "pair", functools.partial(wrong_for_bad, module.pair))
    path = tmp_path / "gpu.json"
    tuned, written = tuning.tune_gpu(["any_b1"], 60, path, WallClock(torch.device("cpu")))
    assert written == path
    attempts = {(a.entry.strategy, a.entry.tile.programs): a.dropped for a in tuned[0].attempts}
    assert attempts[("library", 1)] is None
    assert attempts[("triton", 1)] is None
    assert "wrong: G is off" in (attempts[("triton", 0)] or "")
    table = Table.read(path)
    assert {e.strategy for e in table.entries[:4]} == {*tiles.BY_TRITON, *tiles.BY_PATCHES}
    assert table.entries[4:] == HALF.entries
    assert set(table.measured or {}) == {"gpu", "driver", "torch", "triton", "commit", "date"}
    assert "2 dropped" in capsys.readouterr().out
    some = ("triton_stored",)
    tuned, _ = tuning.tune_gpu(["any_b1"], 60, path, WallClock(torch.device("cpu")), None, some)
    assert {a.entry.strategy for a in tuned[0].attempts} == {present.strategy, *some}


def find_or(present: Entry) -> Callable[..., Entry | None]:
    """`tiles.find` as it is inside `tiles.use`; else `present`, for a CPU has no table."""
    find = tiles.find

    def found(problem: Problem, device: torch.device, *rest: Any, **named: Any) -> Entry | None:
        return find(problem, device, *rest, **named) if tiles.used() else present

    return found
