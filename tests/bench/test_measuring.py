"""Rows and their summary: what is timed was right, what is wrong has no time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ghl.bench import formulas, implementations, measure
from ghl.bench.check import Expected, wrong_sums, wrong_update
from ghl.bench.clock import Ceilings, Timing, WallClock, precision, repetitions
from ghl.bench.implementations import call, names
from ghl.bench.layers import Layer
from ghl.bench.measure import Bench, Row, summarize
from ghl.bench.report import cell, refusals, table
from ghl_kernels import composed
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import Entry, Tile

CPU = torch.device("cpu")
CONV = Layer("conv", 2, 5, 7, (6, 5), (3, 3), (2, 2), (1, 1), tau=0.5, count=3)
POINTWISE = Layer("pointwise", 2, 6, 5, (4, 3))
LINEAR = Layer("linear", 9, 6, 5, linear=True)
GROUPS = Layer("groups", 2, 6, 4, (4, 4), (3, 3), padding=(1, 1), groups=2)


class FakeClock(WallClock):
    """Every call takes as many milliseconds as it was told beforehand."""

    def eager(self, call: Callable[[], object]) -> Timing:
        call()
        return Timing("fake", (1.0, 2.0, 3.0))


def small_tile(layer: Layer) -> Entry:
    kind = tiles.kind(layer.problem(*layer.without_data(torch.float32)))
    tile = Tile(16, 16, 16, 4, 2, programs=8, packed=kind == "packed")
    return Entry(kind, 32, 1, 1, 1, "triton", tile)


@pytest.fixture
def bench() -> Bench:
    return Bench(FakeClock(CPU), Ceilings(1e9, {"float32": 1e9, "bfloat16": 1e9, "tf32": 1e9}))


@pytest.mark.parametrize("layer", [CONV, POINTWISE, LINEAR, GROUPS], ids=lambda x: x.name)
def test_every_implementation_passes_the_check(layer: Layer, bench: Bench) -> None:
    wanted = [n for n in names(layer, "float32", CPU) if "compiled" not in n]
    if layer is POINTWISE:
        assert "trick.matmul" in names(layer, "bfloat16", CPU)
    with tiles.use(small_tile(layer)):  # where Triton is interpreted: a CPU has no table
        rows = bench.layer("test_b2", layer, "float32", wanted)
    assert [row["implementation"] for row in rows] == wanted
    assert not refusals(rows)
    assert all(row["p50_ms"] == 2.0 and row["count"] == layer.count for row in rows)


def test_a_dense_pointwise_layer_is_also_one_product() -> None:
    tensors = POINTWISE.tensors(torch.float32, CPU)
    expected = Expected.of(POINTWISE, tensors)
    update = formulas.trick_by_matmul(*tensors, POINTWISE.tau)
    assert wrong_update(update, expected, "float32") is None


def test_a_wrong_result_has_no_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> torch.Tensor:
        return -formulas.natural(*arguments)  # type: ignore[arg-type]

    fake = type("formulas", (), {"natural": staticmethod(wrong)})
    monkeypatch.setattr(implementations, "formulas", fake)
    (row,) = bench.layer("test_b2", CONV, "float32", ["natural"])
    assert "p50_ms" not in row
    assert row["refused"].startswith("wrong: the update is off by")
    assert cell(row) == "refused"


def test_wrong_sums_of_ours_have_no_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = composed.pair

    def one_weight_off(*arguments: Any) -> tuple[torch.Tensor, ...]:
        G, H0, totals = pair(*arguments)
        return G, H0 + H0.abs().amax() * (torch.arange(H0.numel()).view(H0.shape) == 7), totals

    import ghl_kernels
    from ghl_kernels import native

    for module in (composed, native):
        monkeypatch.setattr(module, "pair", one_weight_off)
    expected = Expected(*(t for t in pair_of(pair)))
    with ghl_kernels.force("composed"):
        row = bench.row(CONV, "ghl", "float32", CONV.tensors(torch.float32, CPU), expected)
    assert row["refused"].startswith("wrong: H0 is off by")


def pair_of(pair: Callable[..., tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    tensors = CONV.tensors(torch.float32, CPU)
    G, H0, _ = pair(CONV.problem(*tensors), *tensors, CONV.tau)
    return G, H0, G


def test_nan_is_wrong() -> None:
    exact = torch.ones(3, 4)
    G = exact.clone()
    G[1, 1] = float("nan")
    assert wrong_sums(G, exact, Expected(exact, exact, exact), "bfloat16")
    assert wrong_update(G, Expected(exact, exact, exact), "bfloat16")
    assert wrong_sums(exact, exact, Expected(exact, exact, exact), "bfloat16") is None


def test_formulas_are_compiled_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a fixed one: a reduction of any size is laid out for the first that it met."""
    asked: list[tuple[object, dict[str, bool]]] = []

    def compile_(formula: object, **options: bool) -> object:
        asked.append((formula, options))
        return formula

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(
        implementations, "compiled", functools.cache(implementations.compiled.__wrapped__)
    )
    layer = Layer("pointwise", 2, 3, 4, (5, 5))
    tensors = layer.tensors(torch.bfloat16, CPU)
    for name in ("natural.compiled", "trick.matmul", "trick.matmul"):
        call(layer, name, tensors)()
    assert asked == [
        (formula, {"dynamic": False, "fullgraph": True})
        for formula in (formulas.natural, formulas.oja)
    ]


def test_a_failure_is_told_by_its_row(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no memory\nand a page of advice")

    monkeypatch.setattr(measure, "call", fails)
    (row,) = bench.layer("test_b2", CONV, "float32", ["trick"])
    assert row["refused"] == "OutOfMemoryError: no memory"


def test_groups_are_not_the_authors() -> None:
    assert "authors" not in names(GROUPS, "float32", CPU)
    dilated = Layer("dilated", 2, 3, 4, (9, 9), (3, 3), dilation=(2, 2))
    with pytest.raises(ValueError, match="dilation"):
        call(dilated, "natural", dilated.tensors(torch.float32, CPU))


def row(layer: str, name: str, ms: float | None, count: int = 1, mode: str = "bfloat16") -> Row:
    found: Row = {"workload": "net_b2", "layer": layer, "implementation": name, "mode": mode,
                  "count": count, "floor_ms": 1.0}  # fmt: skip
    return found | ({"refused": "wrong: x"} if ms is None else {"p50_ms": ms})


def test_the_summary_weighs_layers_by_their_number() -> None:
    rows = [row("a", "ghl", 2.0, 3), row("b", "ghl", 4.0), row("a", "trick", 4.0, 3),
            row("b", "trick", 2.0), row("a", "trick.matmul", 5.0, 3), row("a", "natural", 9.0, 3),
            row("b", "natural", 1.0), row("a", "library", 1.0, 3),
            row("a", "authors", 30.0, 3, "tf32"),
            row("b", "authors", 10.0, 1, "tf32"), row("a", "ghl", 5.0, 3, "tf32"),
            row("b", "ghl", 5.0, 1, "tf32")]  # fmt: skip
    found = summarize(rows)["net_b2"]
    assert found["vs_trick"] == 14 / 10
    assert found["share_of_floor"] == 4 / 10
    assert found["vs_published_tf32"] == 100 / 20
    assert found["vs_published_bfloat16"] == 100 / 10
    assert found["vs_natural_eager"] == 28 / 10
    assert found["vs_best_composition"] == 13 / 10
    assert found["worst_layer"] == {"layer": "b", "ratio": 0.25}
    assert found["worst_choice"] == {"layer": "a", "ratio": 0.5}
    assert "vs_natural_compiled" not in found


def test_a_refused_layer_refuses_its_ratios() -> None:
    rows = [row("a", "ghl", 2.0), row("b", "ghl", 2.0), row("a", "trick", 4.0)]
    assert "vs_trick" not in summarize([*rows, row("b", "trick", None)])["net_b2"]
    rows_of_both = [*rows, row("b", "trick", None), row("b", "trick.matmul", 4.0)]
    assert summarize(rows_of_both)["net_b2"]["vs_trick"] == 8 / 4
    assert summarize([*rows, row("c", "ghl", None)]) == {}
    assert summarize(rows, ["net_b2"]) == {}


def test_after_the_deadline_no_layer_begins(bench: Bench) -> None:
    bench.deadline = 0.0
    assert measure.measure(bench, ["deephebb_b1"]) == ([], ["deephebb_b1"])


def test_rows_of_an_earlier_run_are_not_measured_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def layer(workload: str, layer: Layer, mode: str, wanted: list[str]) -> list[Row]:
        asked.extend(wanted)
        sizes = {"workload": workload, "layer": layer.name, "mode": mode}
        return [{**sizes, "implementation": name} for name in wanted]

    monkeypatch.setattr(bench, "layer", layer)
    rows, _ = measure.measure(bench, ["deephebb_b1"])
    asked.clear()
    assert measure.measure(bench, ["deephebb_b1"], earlier=rows) == (rows, [])
    assert not asked
    measure.measure(bench, ["deephebb_b1"], earlier=rows[:-2] + rows[-1:])
    assert asked == [rows[-2]["implementation"]]


def test_what_a_summary_needs_comes_first_for_all_workloads() -> None:
    asked: list[tuple[str, str, set[str]]] = []

    def layer(workload: str, layer: Layer, mode: str, wanted: list[str]) -> list[dict[str, str]]:
        asked.append((workload, mode, set(wanted)))
        return [{"workload": workload}]

    bench = SimpleNamespace(
        clock=SimpleNamespace(device=torch.device("cuda")), late=False, layer=layer
    )
    told: list[list[str]] = []
    workloads = ["deephebb_b1", "deephebb_b2"]
    rows, unfinished = measure.measure(bench, workloads, lambda rows, late: told.append([*late]))
    assert (len(rows), unfinished) == (len(asked), [])
    third = len(asked) // 3
    first, second, last = (asked[n * third : (n + 1) * third] for n in range(3))
    assert all("trick" in names and not names & {*tiles.STRATEGIES} for *_, names in first)
    for mode, compiled, others in (
        ("bfloat16", {*tiles.BY_CUDA}, {*tiles.BY_TRITON}),
        ("tf32", {"cuda"}, {*tiles.BY_TRITON, *tiles.BY_PATCHES}),  # Hopper's are of 16 bits
    ):
        assert all(names == compiled for _, m, names in second if m == mode)
        assert all(names == others for _, m, names in last if m == mode)
    assert [w for w, *_ in first] == [w for w, *_ in second] == [w for w, *_ in last]
    assert told[0] == workloads and told[third - 1] == workloads[1:] and told[-1] == []


def test_repetitions_follow_the_time_of_one() -> None:
    assert [repetitions(ms) for ms in (0.01, 1.0, 10.0, 100.0, 1e4)] == [50, 30, 20, 6, 5]


def test_precision_is_put_back() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    for mode, allowed in (("tf32", True), ("float32", False)):
        with precision(mode):
            assert matmul.allow_tf32 is cudnn.allow_tf32 is allowed
            assert (matmul.fp32_precision == "tf32") is (cudnn.conv.fp32_precision == "tf32")
            assert (matmul.fp32_precision == "tf32") is allowed
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


def test_a_table_has_a_line_for_each_layer_and_mode() -> None:
    rows = [row("a", "ghl", 2.0), row("a", "trick", None), row("b", "ghl", 1.0)]
    head, first, second = table(rows)
    assert head.split()[-3:] == ["ghl", "trick", "floor"]
    assert "2.0000   refused" in first
    assert second.startswith("b x1")


def test_where_there_is_nothing_to_check_with_no_row_has_a_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Expected, "of", fails)
    rows = bench.layer("test_b2", CONV, "bfloat16", ["ghl", "trick"])
    assert [r["refused"] for r in rows] == ["nothing to check it with: no memory"] * 2
    assert summarize([row("a", "ghl", 1.0) | {"workload": "test_b2"}, *rows]) == {}
