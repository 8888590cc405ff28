"""Rows: one per layer, mode and implementation, each checked before it is timed; and their summary.

A row whose result is wrong, or whose implementation fails, says so and carries no time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ghl_kernels
from ghl.bench.check import Expected, wrong_sums, wrong_update
from ghl.bench.clock import GRAPH_BELOW_MS, MODES, Ceilings, Clock, precision
from ghl.bench.implementations import (
    COMPOSITIONS,
    OURS,
    Tensors,
    call,
    forced,
    names,
    ours_call,
)  # fmt: skip
from ghl.bench.layers import Layer, layers_of
from ghl_kernels.tuning import tiles

Row = dict[str, Any]
ALONE = tuple(name for name in OURS if name != "ghl")
AGAINST: dict[str, tuple[str, ...]] = {
    "vs_trick": ("trick", "trick.matmul"),
    "vs_natural_compiled": ("natural.compiled",),
    "vs_natural_eager": ("natural",),
    "vs_best_composition": COMPOSITIONS,
}
DEFINITIONS = {
    "vs_X": "sum over layers of count x p50 of X, over the same sum of ours (implementation ghl)",
    "natural": "softmax stored, two library weight gradients, elementwise combination",
    "trick": "natural with the decay from the sums, and a compiled epilogue; a layer's faster one "
    "of library weight gradients and matrix products",
    "vs_best_composition": "the same sums, of each layer's fastest natural or trick",
    "vs_published": "the authors' formulation over ours, float32 data, TF32 off for both; theirs "
    "NCHW as published, ours channels_last",
    "vs_published_tf32": "the same with TF32 on for both",
    "vs_published_bfloat16": "the authors' formulation in TF32 over ours in bfloat16",
    "worst_layer": "where the fastest natural or trick is the least of ours, and that ratio",
    "worst_choice": "where the fastest of our implementations, forced, is the least of the one "
    "that the table takes, and that ratio",
    "share_of_floor": "sum of count x floor over sum of count x p50 of ours; the floor is the "
    "larger of FLOPs at the measured matmul rate and bytes at the measured copy bandwidth",
    "p50_ms": "GPU: cold L2; replays of a graph below 2 ms where it can be captured, else events",
    "eager_p50_ms": "the same call launched from Python, gaps between its kernels included",
}


def modes_of(workload: str) -> tuple[str, ...]:
    """DeepHebb has a published implementation, in float32, to be compared with."""
    return tuple(MODES) if workload.startswith("deephebb") else ("bfloat16",)


@dataclasses.dataclass
class Bench:
    """What measuring needs: the clock of a device, its ceilings, and until when."""

    clock: Clock
    ceilings: Ceilings
    deadline: float = float("inf")

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def row(self, layer: Layer, name: str, mode: str, tensors: Tensors, expected: Expected) -> Row:
        """The times of one implementation, or why there are none."""
        try:
            with forced(name), precision(mode):
                if name in OURS:
                    sums = ours_call(layer, tensors, "pair")()
                    wrong = wrong_sums(sums[0], sums[1], expected, mode)
                    if wrong:
                        return {"refused": f"wrong: {wrong}"}
                    del sums
                update = call(layer, name, tensors)
                wrong = wrong_update(update(), expected, mode)
                if wrong:
                    return {"refused": f"wrong: {wrong}"}
                return {**self.which(layer, name), **self.times(update)}
        except Exception as error:  # out of memory, a compiler's error: a row's, not the run's
            return {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:300]}

    @staticmethod
    def which(layer: Layer, name: str) -> Row:
        """The implementation that ran, as the dispatcher tells it."""
        if name not in OURS:
            return {}
        ran = ghl_kernels.last("linear_update" if layer.linear else "conv2d_update")
        return {"ran": ran.name, "reason": ran.reason} if ran else {}

    def times(self, update: Callable[[], object]) -> Row:
        self.clock.warm_up(update)
        eager = self.clock.eager(update)
        graph = self.clock.graph(update) if eager.p50 < GRAPH_BELOW_MS else None
        timing = graph or eager
        return {
            "timing": timing.method,
            "repetitions": len(timing.times),
            "p20_ms": timing.percentile(0.2),
            "p50_ms": timing.p50,
            "p80_ms": timing.percentile(0.8),
            "eager_p50_ms": eager.p50,
        }

    def layer(
        self, workload: str, layer: Layer, mode: str, wanted: Sequence[str] | None = None
    ) -> list[Row]:
        """A row for each implementation of a layer."""
        itemsize = MODES[mode].itemsize
        floor, bound = self.ceilings.floor_ms(layer.flops, layer.bytes(itemsize), mode)
        sizes = {
            "workload": workload, "layer": layer.name, "count": layer.count,
            "shape": layer.shape, "mode": mode, "flops": layer.flops,
            "bytes": layer.bytes(itemsize), "floor_ms": floor, "bound": bound,
        }  # fmt: skip
        rows = []
        for name, row in self.rows(layer, mode, wanted or names(layer, mode, self.clock.device)):
            if "p50_ms" in row:
                row["share_of_floor"] = floor / row["p50_ms"]
            rows.append({**sizes, "implementation": name, **row})
        self.clock.release()
        return rows

    def rows(self, layer: Layer, mode: str, wanted: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """The implementations' names and times; where nothing can be checked, none has one."""
        try:
            tensors = layer.tensors(MODES[mode], self.clock.device)
            expected = Expected.of(layer, tensors)
        except RuntimeError as error:  # out of memory is one too
            refused = f"nothing to check it with: {error}".splitlines()[0][:300]
            yield from ((name, {"refused": refused}) for name in wanted)
            return
        for name in wanted:
            yield name, self.row(layer, name, mode, tensors, expected)


def part_of(name: str) -> int:
    """What is measured first: what a summary is made of; then what hardly waits for a compiler."""
    if name not in ALONE:
        return 0
    return 1 if name in tiles.BY_CUDA else 2


def measure(
    bench: Bench,
    workloads: Iterable[str],
    done: Callable[[list[Row], list[str]], None] = lambda rows, unfinished: None,
    earlier: Sequence[Row] = (),
    modes: Sequence[str] | None = None,
) -> tuple[list[Row], list[str]]:
    """The rows of the workloads, and those whose summary has not all of its rows by the deadline.

    What a summary is made of comes first, for all workloads; then each of ours by itself, those
    whose products are compiled ahead of time before the others. `done` is told both after every
    layer. earlier: rows that are not measured again. modes: instead of those of each workload.
    """
    rows = list(earlier)
    have = {(row["workload"], row["mode"], row["layer"], row["implementation"]) for row in rows}
    workloads = list(dict.fromkeys(workloads))
    unfinished = list(workloads)
    for part in range(3):
        for workload in workloads:
            for mode, layer in itertools.product(modes or modes_of(workload), layers_of(workload)):
                if bench.late:
                    return rows, unfinished
                of_layer = names(layer, mode, bench.clock.device)
                wanted = [name for name in of_layer if part_of(name) == part]
                of_this = workload, mode, layer.name
                if wanted := [name for name in wanted if (*of_this, name) not in have]:
                    rows += bench.layer(workload, layer, mode, wanted)
                    done(rows, unfinished)
            if part == 0:
                unfinished.remove(workload)
    return rows, unfinished


def total(rows: Sequence[Row], workload: str, mode: str, *names: str) -> float | None:
    """Milliseconds of all layers, each by the fastest of these implementations; None if all of a
    layer's were refused, or none was measured."""
    fastest: dict[str, float] = {}
    for row in rows:
        if (row["workload"], row["mode"]) == (workload, mode) and row["implementation"] in names:
            ms = row["count"] * row.get("p50_ms", math.inf)
            fastest[row["layer"]] = min(ms, fastest.get(row["layer"], math.inf))
    found = sum(fastest.values())
    return found if fastest and found < math.inf else None


def worst(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any] | None:
    """The layer where ours does worst against the fastest of these implementations."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if "p50_ms" in row and row["mode"] == "bfloat16":
            times.setdefault(row["layer"], {})[row["implementation"]] = row["p50_ms"]
    ratios = {
        layer: min(of[name] for name in names if name in of) / of["ghl"]
        for layer, of in times.items()
        if "ghl" in of and any(name in of for name in names)
    }
    if not ratios:
        return None
    layer = min(ratios, key=lambda name: ratios[name])
    return {"layer": layer, "ratio": ratios[layer]}


def summarize(rows: Sequence[Row], unfinished: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The ratios of each workload that was measured whole; a refused layer refuses its ratio."""
    summary: dict[str, dict[str, Any]] = {}
    for workload in dict.fromkeys(row["workload"] for row in rows):
        if workload in unfinished:
            continue
        ghl = total(rows, workload, "bfloat16", "ghl")
        if ghl is None:
            continue
        mine = [row for row in rows if row["workload"] == workload]
        floor = sum(
            row["count"] * row["floor_ms"]
            for row in mine
            if row["implementation"] == "ghl" and row["mode"] == "bfloat16"
        )
        found: dict[str, Any] = {"ghl_ms": ghl, "floor_ms": floor, "share_of_floor": floor / ghl}
        for key, others in AGAINST.items():
            other = total(rows, workload, "bfloat16", *others)
            if other is not None:
                found[key] = other / ghl
        found.update(against_published(rows, workload, ghl))
        for key, others in (("worst_layer", COMPOSITIONS), ("worst_choice", ALONE)):
            if least := worst(mine, others):
                found[key] = least
        summary[workload] = found
    return summary


def against_published(rows: Sequence[Row], workload: str, bfloat16: float) -> dict[str, float]:
    """The ratios to the authors' formulation, where it was measured."""
    found = {}
    for key, mode in (("vs_published", "float32"), ("vs_published_tf32", "tf32")):
        theirs, own = (total(rows, workload, mode, name) for name in ("authors", "ghl"))
        if theirs and own:
            found[key] = theirs / own
    theirs = total(rows, workload, "tf32", "authors")
    if theirs:
        found["vs_published_bfloat16"] = theirs / bfloat16
    return found
