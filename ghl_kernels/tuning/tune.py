"""Chooses tiles by measuring: candidates for a layer, an attempt at each, and the table they make.

Timing is handed in (`ghl bench tune` brings it), so that nothing here needs a GPU; a run never
tunes, it reads the table through `tiles.py`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ghl_kernels.files import write_text
from ghl_kernels.fold import Fold
from ghl_kernels.problem import Problem
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import BY_OTHERS, BY_TRITON, Entry, Tile, least_block

SHARED_MEMORY = 227 * 1024  # of a Hopper multiprocessor; where there is less the launch says so

# block_m, block_k, block_c, warps, stages, programs of every multiprocessor, and the options
Shape = tuple[int, int, int, int, int, int]
DESCRIPTORS, TAPS_3, PACKED = {"descriptors": True}, {"taps": 3}, {"packed": True}
TILES: dict[tuple[str, int], tuple[tuple[Shape, dict[str, Any]], ...]] = {
    ("pointwise", 16): (
        ((64, 128, 128, 8, 3, 1), DESCRIPTORS),
        ((128, 128, 128, 8, 2, 1), DESCRIPTORS),
        ((64, 64, 64, 4, 3, 3), DESCRIPTORS),
        ((64, 64, 128, 4, 3, 2), DESCRIPTORS),
        ((64, 128, 64, 4, 3, 1), DESCRIPTORS),
        ((64, 64, 256, 8, 3, 1), DESCRIPTORS),
        ((64, 256, 64, 8, 3, 1), DESCRIPTORS),
        ((64, 128, 128, 8, 4, 1), DESCRIPTORS),
        ((64, 128, 128, 8, 3, 1), {}),
        ((64, 64, 64, 4, 3, 3), {}),
        ((64, 64, 64, 4, 4, 2), DESCRIPTORS),
        ((64, 64, 64, 4, 2, 4), DESCRIPTORS),
        ((128, 64, 64, 4, 3, 1), DESCRIPTORS),
        ((64, 64, 128, 8, 4, 1), DESCRIPTORS),
        ((64, 128, 64, 8, 4, 1), DESCRIPTORS),
        ((64, 128, 64, 8, 3, 1), DESCRIPTORS),
        ((64, 256, 64, 8, 2, 1), DESCRIPTORS),
    ),
    ("conv", 16): (
        ((64, 128, 128, 8, 3, 1), {}),
        ((64, 64, 64, 8, 3, 1), TAPS_3),
        ((64, 64, 64, 4, 3, 3), {}),
        ((64, 64, 128, 4, 3, 2), {}),
        ((64, 128, 64, 4, 3, 1), {}),
        ((64, 128, 128, 8, 4, 1), {}),
        ((64, 64, 64, 8, 4, 1), TAPS_3),
        ((64, 64, 128, 8, 3, 2), {}),
        ((64, 256, 64, 8, 3, 1), {}),
        ((32, 128, 128, 8, 4, 1), {}),
        ((64, 16, 16, 4, 3, 3), {}),
        ((64, 32, 32, 4, 3, 3), {}),
    ),
    ("packed", 16): (
        ((64, 64, 32, 4, 3, 2), PACKED),
        ((64, 64, 64, 4, 3, 2), PACKED),
        ((64, 128, 128, 8, 2, 1), PACKED),
        ((64, 64, 32, 4, 2, 2), PACKED),
        ((64, 64, 64, 8, 3, 1), PACKED),
        ((64, 128, 64, 8, 3, 1), PACKED),
        ((64, 128, 32, 4, 3, 2), PACKED),
        ((64, 16, 64, 4, 3, 3), PACKED),
        ((64, 64, 64, 4, 3, 3), {}),
        ((64, 64, 128, 4, 3, 2), {}),
        ((64, 128, 128, 8, 3, 1), {}),
        ((64, 128, 64, 8, 3, 1), {}),
        ((64, 64, 32, 4, 3, 3), {}),
    ),
    ("pointwise", 32): (
        ((32, 64, 64, 4, 3, 2), {}),
        ((32, 128, 64, 8, 3, 1), {}),
        ((32, 64, 128, 8, 3, 1), {}),
        ((64, 64, 64, 8, 2, 1), {}),
    ),
    ("conv", 32): (
        ((32, 64, 64, 4, 3, 2), {}),
        ((32, 128, 64, 8, 3, 1), {}),
        ((32, 64, 128, 8, 3, 1), {}),
        ((64, 64, 64, 8, 2, 1), {}),
    ),
    ("packed", 32): (
        ((32, 64, 64, 4, 2, 2), PACKED),
        ((32, 64, 32, 4, 3, 3), PACKED),
        ((32, 128, 64, 8, 2, 1), PACKED),
        ((32, 64, 64, 4, 3, 2), {}),
        ((32, 128, 64, 8, 3, 1), {}),
    ),
    ("depthwise", 16): (((4, 64, 16, 4, 2, 4), {}), ((8, 32, 16, 4, 2, 4), {})),
    ("depthwise", 32): (((4, 64, 16, 4, 2, 4), {}), ((8, 32, 16, 4, 2, 4), {})),
}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One candidate of a layer: its milliseconds, or why it was dropped."""

    entry: Entry
    milliseconds: float | None
    dropped: str | None = None


def bits(problem: Problem) -> int:
    return 8 * problem.dtype.itemsize


def shared_memory(tile: Tile, itemsize: int) -> int:
    """Bytes of the tiles of x, y and g in flight; the compiler's own are not counted."""
    of_row = tile.block_c * tile.taps + 2 * tile.block_k
    return tile.block_m * of_row * itemsize * tile.stages


def useful(problem: Problem, tile: Tile) -> bool:
    """Whether a tile can suit a layer: it divides its taps, is not mostly empty, and may fit.

    A tile that a layer is folded for does if the folded x is hardly larger than a stored u.
    """
    if problem.depthwise:
        return True
    if tiles.kind(problem) == "packed" and not tile.packed:
        fold = Fold.of(problem) if problem.foldable else None
        if fold is None or fold.step > problem.neurons:
            return False
        problem = fold.folded()
    across = problem.columns if tile.packed else problem.channels
    return (
        problem.kernel_size[1] % tile.taps == 0
        and tile.block_k <= least_block(problem.neurons)
        and tile.block_c <= least_block(across)
        and shared_memory(tile, problem.dtype.itemsize) <= SHARED_MEMORY
    )


def candidates(
    problem: Problem,
    present: Entry | None = None,
    known: Sequence[Entry] = (),
    compiled: Sequence[tuple[str, Tile]] = (),
    by_triton: Sequence[str] = BY_TRITON,
) -> list[Entry]:
    """What a layer may take, `present` first: what it takes now must be in the comparison.

    known: entries of a table, whose tiles of the layer's kind are tried as well. compiled: the
    strategies and tiles of kernels that are not Triton's. by_triton: Triton's strategies that run.
    """
    entries = [Entry.for_layer(problem, present.strategy, present.tile)] if present else []
    entries += of_triton(problem, present, known, by_triton)
    entries += [Entry.for_layer(problem, strategy, tile) for strategy, tile in compiled]
    first = {e.strategy: e for e in reversed(entries)}  # of those whose tile is not used
    kept = (e for e in entries if e.strategy not in BY_OTHERS or e == first[e.strategy])
    return list(dict.fromkeys(kept))


def of_triton(
    problem: Problem, present: Entry | None, known: Sequence[Entry], strategies: Sequence[str]
) -> list[Entry]:
    """The candidates of Triton's strategies."""
    kind = tiles.kind(problem)
    listed = [Tile(*shape, **options) for shape, options in TILES[kind, bits(problem)]]
    alike = [e for e in known if (e.kind, e.bits) == (kind, bits(problem))]
    listed += [e.tile for e in alike if e.strategy in BY_TRITON]
    of_kind = [tile for tile in dict.fromkeys(listed) if useful(problem, tile)]
    if not of_kind and present and present.strategy in BY_TRITON:
        of_kind = [present.tile]
    entries = []
    if "library" in strategies:
        entries += [Entry.for_layer(problem, "library", tile) for tile in of_kind[:1]]
    for tile in of_kind:
        entries += [Entry.for_layer(problem, s, tile) for s in strategies if s != "library"]
    return entries


def attempt_all(
    entries: Sequence[Entry], measure: Callable[[Entry], float], deadline: float
) -> list[Attempt]:
    """Every candidate in turn until the deadline; at least the first is tried.

    `measure` gives milliseconds, or raises for a candidate that fails or is wrong.
    """
    attempts: list[Attempt] = []
    for entry in entries:
        if attempts and time.monotonic() > deadline:
            break
        try:
            attempts.append(Attempt(entry, measure(entry)))
        except Exception as error:  # a compiler or a driver raises what it likes
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            attempts.append(Attempt(entry, None, reason[:200]))
    return attempts


def best(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The fastest of each strategy, the fastest first, which is what a layer takes."""
    ranked = sorted(
        (t for t in attempts if t.milliseconds is not None), key=lambda t: t.milliseconds or 0.0
    )
    by_strategy: dict[str, Attempt] = {}
    for attempt in ranked:
        by_strategy.setdefault(attempt.entry.strategy, attempt)
    return list(by_strategy.values())


def sizes(entry: Entry) -> tuple[Any, ...]:
    return entry.kind, entry.bits, entry.rows, entry.neurons, entry.columns


def merged(base: Sequence[Entry], tuned: Sequence[Entry]) -> list[Entry]:
    """The tuned entries, and behind them those of the base table of other sizes or strategies."""
    done = {(sizes(entry), entry.strategy) for entry in tuned}
    return [*tuned, *(entry for entry in base if (sizes(entry), entry.strategy) not in done)]


def as_json(entry: Entry) -> str:
    """One line of a measured table; what is as by default is left out."""
    defaults = {f.name: f.default for f in dataclasses.fields(Tile)}
    fields = dataclasses.asdict(entry)
    if fields["measured"]:
        del fields["measured"]
    fields["tile"] = {n: v for n, v in fields["tile"].items() if v != defaults[n]}
    return json.dumps(fields)


def write(
    path: Path, entries: Sequence[Entry], measured: dict[str, str], merges: str | None = None
) -> None:
    """Write a table whole or not at all, so that a reader never meets half of one.

    merges: the implementation whose merge of many layers is the fastest.
    """
    lines = ",\n    ".join(as_json(entry) for entry in entries)
    text = (
        f'{{\n  "measured": {json.dumps(measured)},\n  "merges": {json.dumps(merges)},\n'
        f'  "entries": [\n    {lines}\n  ]\n}}\n'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text, shared=True)
