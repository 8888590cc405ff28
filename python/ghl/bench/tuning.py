"""`ghl bench tune`: tries the candidates of `ghl_kernels.tuning.tune` on the GPU at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import ghl_kernels
from ghl.bench.check import Expected, wrong_sums
from ghl.bench.clock import MODES, Clock, precision
from ghl.bench.compiling import compile_all, compiled_alike
from ghl.bench.implementations import Tensors, ours_call
from ghl.bench.layers import Layer, layers_of
from ghl.bench.report import provenance
from ghl_kernels import Problem, dispatch
from ghl_kernels.cuda import kernels
from ghl_kernels.tuning import tiles, tune
from ghl_kernels.tuning.tune import Attempt, Entry

HOPELESS = 1.4  # times the best: a candidate is not worth timing well
SHARE_OF_COMPILING = 0.45
TRIED = tuple(s for s in tiles.STRATEGIES if s not in tiles.UNPROVEN)
TUNED_MODES = "bfloat16", "tf32"  # float32 without TF32 is a library's by every table


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A layer and what was tried for it, what it took before first."""

    layer: Layer
    mode: str
    attempts: tuple[Attempt, ...]

    @property
    def winner(self) -> Attempt | None:
        best = tune.best(self.attempts)
        return best[0] if best else None

    def line(self) -> str:
        """What was chosen, and how much faster that is than the choice before."""
        dropped = sum(a.milliseconds is None for a in self.attempts)
        text = f"{self.layer.shape:<34} {self.mode:<9}"
        if self.winner is None or self.winner.milliseconds is None:
            return f"{text} nothing ran: {self.attempts[0].dropped}"
        before = self.attempts[0].milliseconds
        gain = f"{before / self.winner.milliseconds:5.2f}x" if before else "  new"
        of = f"of {len(self.attempts)}" + (f", {dropped} dropped" if dropped else "")
        entry = self.winner.entry
        tile = [v for k, v in dataclasses.asdict(entry.tile).items() if v is not False]
        return f"{text} {self.winner.milliseconds:8.4f} ms {gain} {entry.strategy} {tile} {of}"


def modes_to_tune(workload: str) -> tuple[str, ...]:
    """bfloat16; and TF32 for the network whose published form is float32."""
    return TUNED_MODES if workload.startswith("deephebb") else TUNED_MODES[:1]


def layers_to_tune(
    workloads: Iterable[str], modes: Sequence[str] | None = None
) -> list[tuple[Layer, str]]:
    """Each layer once, whichever workloads have it; in these modes, or in those of its workload."""
    found: dict[tuple[Layer, str], tuple[Layer, str]] = {}
    for workload in workloads:
        for mode in modes or modes_to_tune(workload):
            for layer in layers_of(workload):
                sizes = dataclasses.replace(layer, name="", count=1, tau=1.0)
                found.setdefault((sizes, mode), (layer, mode))
    return list(found.values())


def problem_of(layer: Layer, mode: str) -> Problem:
    """The sizes of a layer without its tensors."""
    return layer.problem(*layer.without_data(MODES[mode]))


class Measure:
    """Milliseconds of a candidate on one layer; raises for one that is wrong or does not run."""

    def __init__(
        self, layer: Layer, mode: str, clock: Clock, failed: dict[tuple[Any, ...], str]
    ) -> None:
        self.layer, self.mode, self.clock, self.failed = layer, mode, clock, failed
        self.best = float("inf")

    @functools.cached_property
    def data(self) -> tuple[Tensors, Expected]:
        """The layer's tensors and what is right: made by the first attempt, which may lack memory
        for them."""
        tensors = self.layer.tensors(MODES[self.mode], self.clock.device)
        return tensors, Expected.of(self.layer, tensors)

    def __call__(self, entry: Entry) -> float:
        reason = self.failed.get(compiled_alike(self.layer, self.mode, entry))
        if reason:
            raise RuntimeError(reason)
        tensors, expected = self.data
        with tiles.use(entry), ghl_kernels.force(entry.strategy), precision(self.mode):
            G, H0, _ = ours_call(self.layer, tensors, "pair")()
            wrong = wrong_sums(G, H0, expected, self.mode)
            if wrong:
                raise RuntimeError(f"wrong: {wrong}")
            update = ours_call(self.layer, tensors, "update")
            update()
            quick = self.clock.quick(update)
            if quick > HOPELESS * self.best:
                return quick
            self.clock.warm_up(update)
            milliseconds = (self.clock.graph(update) or self.clock.eager(update)).p50
        self.best = min(self.best, quick)
        return milliseconds


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the measuring, not the program: what was measured is kept."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: what was measured so far is kept", flush=True)


def tune_layers(
    layers: Sequence[tuple[Layer, str]],
    attempt: Callable[[Layer, str, Sequence[Entry], float], Sequence[Attempt]],
    candidates: Callable[[Problem], Sequence[Entry]],
    seconds: float,
    done: Callable[[Sequence[Tuned]], None],
) -> list[Tuned]:
    """Try every layer's candidates, each layer for its share of the time that is left.

    `done` is told what is tuned after every layer, so that nothing is lost to an interruption.
    """
    deadline = time.monotonic() + seconds
    tuned: list[Tuned] = []
    with interruptible():
        for number, (layer, mode) in enumerate(layers):
            left = deadline - time.monotonic()
            if left <= 0 and tuned:
                break
            entries = candidates(problem_of(layer, mode))
            until = time.monotonic() + 2 * left / (len(layers) - number)
            attempts = attempt(layer, mode, entries, min(until, deadline))
            tuned.append(Tuned(layer, mode, tuple(attempts)))
            done(tuned)
    return tuned


def fastest_merges(clock: Clock) -> str | None:
    """The implementation whose merge of all layers of a ResNet-50 is the fastest; None if none
    runs. Each is timed as an optimizer's step calls it, with its launches."""
    layers = [sums_of(layer, clock.device) for layer in layers_of("resnet50_b1")]
    lists = [list(one) for one in zip(*layers, strict=True)]
    times: dict[str, float] = {}
    for name in ("triton", "cuda"):
        if dispatch.unavailable(name, lists[0][0], None):
            continue
        with ghl_kernels.force(name):

            def merge() -> object:
                return torch.ops.ghl_kernels.foreach_merge(*lists, "oja", "sign", "absmax")

            try:
                clock.warm_up(merge)
                times[name] = clock.eager(merge).p50
            except RuntimeError as error:
                print(f"merges by {name}: {error}".splitlines()[0][:200])
    clock.release()
    return min(times, key=lambda name: times[name]) if times else None


def sums_of(layer: Layer, device: torch.device) -> tuple[torch.Tensor, ...]:
    """G, H0, totals and a weight of these sizes, in float32."""
    shape = layer.out_channels, layer.columns
    G, H0, w = torch.randn(3, *shape, device=device)
    return G, H0, torch.ones(layer.out_channels + 1, device=device), w


def measured_on(device: torch.device) -> dict[str, str]:
    """What a table's figures depend on."""
    where = provenance(device)
    keys = "gpu", "driver", "torch", "triton", "commit", "date"
    return {key: str(where[key]) for key in keys}


def as_log(tuned: Sequence[Tuned]) -> list[dict[str, Any]]:
    """Every attempt, for a file beside the table."""
    return [
        {
            "layer": t.layer.name, "shape": t.layer.shape, "mode": t.mode,
            "attempts": [
                {"strategy": a.entry.strategy, "tile": dataclasses.asdict(a.entry.tile),
                 "ms": a.milliseconds, "dropped": a.dropped}
                for a in t.attempts
            ],
        }
        for t in tuned
    ]  # fmt: skip


def choices(tuned: Sequence[Tuned]) -> list[Entry]:
    """The entries of a table: of each layer its best strategies, the fastest first.

    A table does not tell layers of equal sizes apart, as those of another stride: they take what is
    the fastest for all of them together, of what was tried for each.
    """
    alike: dict[tuple[Any, ...], list[Tuned]] = {}
    for t in tuned:
        alike.setdefault(tune.sizes(t.attempts[0].entry), []).append(t)
    entries = []
    for group in alike.values():
        times: dict[Entry, list[float]] = {}
        for t in group:
            for a in t.attempts:
                if a.milliseconds is not None:
                    times.setdefault(a.entry, []).append(a.milliseconds)
        of_all = [Attempt(e, sum(ms)) for e, ms in times.items() if len(ms) == len(group)]
        entries += [attempt.entry for attempt in tune.best(of_all)]
    return entries


def tune_gpu(
    workloads: Sequence[str],
    seconds: float,
    out: Path | None,
    clock: Clock,
    modes: Sequence[str] | None = None,
    strategies: Sequence[str] = TRIED,
) -> tuple[list[Tuned], Path]:
    """Tune for the GPU of the clock and write its table; what was tried, and the table's path.

    strategies: to try beside what a layer takes now.
    """
    device = clock.device
    path = out or tiles.user_tables() / f"{tiles.gpu_name(device)}.json"
    start, base = time.monotonic(), tiles.table(device)
    measured, layers = measured_on(device), layers_to_tune(workloads, modes)
    merges = fastest_merges(clock)
    some = torch.empty(0, device=device)

    def candidates(problem: Problem) -> list[Entry]:
        runs = [s for s in tiles.STRATEGIES if not dispatch.unavailable(s, some, problem)]
        tried = [s for s in runs if s in strategies]
        compiled = [
            (s, tile)
            for s in strategies  # in their order: a layer's time may be up before the last
            if s in tried and s in tiles.BY_CUDA
            for tile in kernels.candidates(s, problem)
        ]
        compiled += [(s, tiles.OF_PATCHES) for s in tiles.BY_PATCHES if s in tried]
        by_triton = [s for s in tiles.BY_TRITON if s in tried]
        present = tiles.find(problem, device, among=tuple(runs))
        return tune.candidates(problem, present, base.entries, compiled, by_triton)

    def attempt(
        layer: Layer, mode: str, entries: Sequence[Entry], until: float
    ) -> Sequence[Attempt]:
        try:
            return tune.attempt_all(entries, Measure(layer, mode, clock, failed), until)
        finally:
            clock.release()

    def done(tuned: Sequence[Tuned]) -> None:
        print(tuned[-1].line(), flush=True)
        others = base.entries_on(measured["gpu"])
        tune.write(path, tune.merged(others, choices(tuned)), measured, merges)

    jobs = []
    for layer, mode in layers:
        jobs += [(layer, mode, e) for e in candidates(problem_of(layer, mode))]
    failed = compile_all(jobs, SHARE_OF_COMPILING * seconds)
    print(f"compiled {len(jobs)} candidates in {time.monotonic() - start:.0f} s", flush=True)
    left = seconds - (time.monotonic() - start)
    try:
        return tune_layers(layers, attempt, candidates, left, done), path
    finally:  # what was written is another table now
        dispatch.forget()
