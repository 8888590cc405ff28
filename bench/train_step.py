"""Times a whole training step of one network under GHL, backpropagation and the natural layer.

`python -m bench.train_step --arch resnet50 --batch-size 256 --amp bf16 --channels-last --compile`:
prints a table and writes bench/results/train-step-<machine>.json. Nothing is reported unless GHL's
updates are those of the natural layer, and by the kernels that are meant to make them.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghl
from bench import natural
from bench.memory import peak_transient
from bench.report import RESULTS, machine_name
from bench.step_profile import of_gpu
from ghl.bench.clock import Timing
from ghl.bench.report import provenance, write_json
from ghl.recipes import models
from ghl_kernels.tuning.tiles import gpu_name

CLASSES = 1000
TAU = 1.0
DTYPES = {"none": None, "bf16": torch.bfloat16}
# Between two ways of computing |H|, each normalised by its largest: mean difference of a layer.
TOLERANCE = {"none": 1e-3, "bf16": 2e-2}


def plain(model: nn.Module) -> None:
    """Backpropagation: the network as it is."""


def swapped(model: nn.Module) -> None:
    """GHL in every convolution."""
    ghl.swap(model, rule="ghl", tau=TAU)


def naturally(model: nn.Module) -> None:
    """The same by PyTorch's own operators."""
    natural.swap(model, TAU)


CONTESTANTS: dict[str, Callable[[nn.Module], None]] = {
    "bp": plain,
    "ghl": swapped,
    "synchronized": swapped,  # and merged once, before the optimizer's step
    "natural": naturally,
}
MODES = "default", "reduce-overhead"
IN_A_ROW, ROUNDS = 5, 5  # steps that nobody waits for in between, as in a training loop


class Contestant:
    """A network, its optimizer, and the step that is timed."""

    def __init__(self, name: str, options: argparse.Namespace, *, compiled: bool) -> None:
        torch.manual_seed(0)
        self.options = options
        self.model = models.build(options.arch, 3, CLASSES, options.size, options.width)
        self.model.to(options.device)
        if options.channels_last:
            self.model.to(memory_format=torch.channels_last)
        CONTESTANTS[name](self.model)
        if compiled:
            self.model.compile(mode=options.mode)
        fused = options.device == "cuda"
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, fused=fused)
        synchronized = name == "synchronized"
        self.handle = ghl.synchronize(self.model, self.optimizer) if synchronized else None

    def backward(self, images: Tensor, classes: Tensor) -> None:
        dtype = DTYPES[self.options.amp]
        options: Any = {"enabled": dtype is not None, "cache_enabled": not self.options.graph}
        with torch.autocast(images.device.type, dtype, **options):
            loss = F.cross_entropy(self.model(images), classes)
        loss.backward()

    def step(self, images: Tensor, classes: Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self.backward(images, classes)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def captured(self, data: Any) -> Callable[[], None]:
        """The whole step as a CUDA graph: what it takes where no GPU waits for Python."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(*data)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(*data)
        return graph.replay


def refuse_to_fall_back() -> None:
    """What the dispatcher would only warn of ends the run, in whatever thread: PyTorch's operators
    in the place of a kernel whose trial has failed are not what is to be timed."""
    warnings.filterwarnings("error", message="ghl_kernels ", category=UserWarning)


def batch(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = options.batch_size, 3, options.size, options.size
    images = torch.randn(shape, generator=generator).to(options.device)
    classes = torch.randint(CLASSES, (options.batch_size,), generator=generator)
    if options.channels_last:
        images = images.to(memory_format=torch.channels_last)
    return images, classes.to(options.device)


def check_same_updates(ours: Contestant, theirs: Contestant, data: Any, tolerance: float) -> None:
    """Magnitudes of the updates of both; signs are those of gradients that rounding may flip."""
    for contestant in (ours, theirs):
        contestant.backward(*data)
        if contestant.handle is not None:
            contestant.handle.merge()
    layers = (
        [(n, m) for n, m in c.model.named_modules() if isinstance(m, nn.Conv2d)]
        for c in (ours, theirs)
    )
    for (name, one), (_, other) in zip(*layers, strict=True):
        assert one.weight.grad is not None
        assert other.weight.grad is not None
        apart = (one.weight.grad.abs() - other.weight.grad.abs()).abs().mean().item()
        if not apart < tolerance:
            raise RuntimeError(f"updates of {name} differ by {apart:g} on average: nothing to time")
    for contestant in (ours, theirs):
        contestant.optimizer.zero_grad()


class Seconds(NamedTuple):
    """Until a step has returned, and until it is done."""

    host: float
    whole: float


def seconds_of(call: Callable[[], None], device: str) -> Seconds:
    begin = time.perf_counter()
    call()
    returned = time.perf_counter()
    if device == "cuda":
        torch.cuda.synchronize()
    return Seconds(returned - begin, time.perf_counter() - begin)


def in_a_row(steps: dict[str, Callable[[], None]], device: str) -> dict[str, float]:
    """Milliseconds of a step that follows another without a wait, the median of some rounds."""

    def several(step: Callable[[], None]) -> None:
        for _ in range(IN_A_ROW):
            step()

    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            whole = seconds_of(lambda step=step: several(step), device).whole
            times[name].append(1e3 * whole / IN_A_ROW)
    return {name: statistics.median(ms) for name, ms in times.items()}


def peak_bytes(call: Callable[[], None], device: str) -> int:
    """What a step needs above what is there before it."""
    if device != "cuda":
        return peak_transient(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def wait(ready: Path, gate: Path, device: str) -> None:
    """Makes the one file and waits for the other; what memory only steps need is for others until
    then."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    ready.touch()
    while not gate.exists():
        time.sleep(0.05)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per contestant; their steps take turns, so that a busy machine slows all alike."""
    began = time.perf_counter()
    data = batch(options)
    names = options.contestants
    contestants = {name: Contestant(name, options, compiled=options.compile) for name in names}
    if ours := [c for name, c in contestants.items() if CONTESTANTS[name] is swapped]:
        exact = Contestant("natural", options, compiled=False)
        for contestant in ours:
            check_same_updates(contestant, exact, data, TOLERANCE[options.amp])
        del exact
    steps: dict[str, Callable[[], None]] = {
        name: c.captured(data) if options.graph else (lambda c=c: c.step(*data))
        for name, c in contestants.items()
    }
    for step in steps.values():
        for _ in range(options.warmup):
            step()
    if options.when:
        print(f"ready after {time.perf_counter() - began:.0f} s", flush=True)
        wait(*options.when, options.device)
    # a graph's memory is there before its replay
    peaks = {
        name: None if options.graph else peak_bytes(step, options.device)
        for name, step in steps.items()
    }
    times: dict[str, list[Seconds]] = {name: [] for name in steps}
    for _ in range(options.steps):
        for name, step in steps.items():
            times[name].append(seconds_of(step, options.device))
    rows = [row(name, times[name], peaks[name], options) for name in steps]
    if options.device == "cuda":
        unwaited = in_a_row(steps, options.device)
        for one in rows:
            name = one["implementation"]
            one |= {"in_a_row_ms": unwaited[name]} | of_gpu(steps[name])
    return rows


def row(
    name: str, seconds: list[Seconds], peak: int | None, options: argparse.Namespace
) -> dict[str, Any]:
    timing, host = (
        Timing("wall clock", tuple(sorted(1e3 * of(s) for s in seconds)))
        for of in (lambda s: s.whole, lambda s: s.host)
    )
    return {
        "implementation": name,
        "steps": len(seconds),
        "p20_ms": timing.percentile(0.2),
        "p50_ms": timing.p50,
        "p80_ms": timing.percentile(0.8),
        "host_ms": host.p50,
        "images_per_second": options.batch_size / timing.p50 * 1e3,
        "peak_bytes": peak,
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Time of each over that of backpropagation, and memory of GHL's step; none without it."""
    of = {r["implementation"]: r for r in rows}
    bp = of.pop("bp", None)
    if bp is None:
        return {}
    found = {f"{name}_over_bp": r["p50_ms"] / bp["p50_ms"] for name, r in of.items()}
    if "in_a_row_ms" in bp:
        found |= {
            f"{name}_over_bp_in_a_row": r["in_a_row_ms"] / bp["in_a_row_ms"]
            for name, r in of.items()
        }
    if "ghl" in of and bp["peak_bytes"]:
        found["memory_over_bp"] = of["ghl"]["peak_bytes"] / bp["peak_bytes"]
    return found


def told(row: dict[str, Any], key: str) -> str:
    """A figure that only a GPU has."""
    return format(row[key], ".2f") if key in row else "-"


def print_table(rows: list[dict[str, Any]]) -> None:
    base = rows[0]
    print(
        f"{'':<12} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'host ms':>9} {'in a row':>9}"
        f" {'GPU ms':>9}"
        f" {'images/s':>9} {'peak MB':>9}"
        f" {'time / ' + base['implementation']:>10} {'memory':>12}"
    )
    for r in rows:
        print(
            f"{r['implementation']:<12} {r['p20_ms']:>9.2f} {r['p50_ms']:>9.2f} {r['p80_ms']:>9.2f}"
            f" {r['host_ms']:>9.2f} {told(r, 'in_a_row_ms'):>9} {told(r, 'gpu_ms'):>9}"
            f" {r['images_per_second']:>9.1f} {(r['peak_bytes'] or 0) / 1e6:>9.1f}"
            f" {r['p50_ms'] / base['p50_ms']:>10.2f}"
            f" {(r['peak_bytes'] or 0) / (base['peak_bytes'] or 1):>12.2f}"
        )


def machine(device: str) -> str:
    return gpu_name(torch.device(device)) if device == "cuda" else machine_name()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="bench.train_step")
    add = parser.add_argument
    add("--arch", default="resnet50")
    add("--width", type=float, default=1.0)
    add("--size", type=int, default=224)
    add("--batch-size", type=int, default=256)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--amp", default="none", choices=tuple(DTYPES))
    add("--channels-last", action="store_true")
    add("--compile", action="store_true")
    add("--mode", default="default", choices=MODES, help="of torch.compile")
    add("--graph", action="store_true", help="the whole step is captured and replayed")
    add("--contestants", nargs="+", default=["bp", "ghl", "natural"],
        choices=tuple(CONTESTANTS))  # fmt: skip
    add("--warmup", type=int, default=3, help="steps before the timed ones")
    add("--steps", type=int, default=20, help="timed steps of each")
    add(
        "--when",
        type=Path,
        nargs=2,
        metavar=("READY", "GATE"),
        help="networks are built, compiled and warmed, the first file made, and steps timed when "
        "the second is there",
    )
    add("--out", type=Path, help="by default bench/results/train-step-MACHINE.json")
    options = parser.parse_args(arguments)
    if options.graph and options.device != "cuda":
        parser.error(f"--graph: --device is {options.device}, must be cuda")
    if options.mode != MODES[0] and not options.compile:
        parser.error(f"--mode {options.mode}: expected with --compile")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    where = provenance(torch.device(options.device))
    with warnings.catch_warnings():
        refuse_to_fall_back()
        rows = measure(options)
    print_table(rows)
    name = machine(options.device)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "when")}
    result = {**where, "machine": name, "settings": settings, "ratios": ratios(rows)}
    result["rows"] = rows
    path = options.out or RESULTS / f"train-step-{name}.json"
    write_json(path, result)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
