"""What `ghl bench layers` and `ghl bench tune` do, given their arguments.

`layers` ends with exit status 1 when a result of ours was wrong, whatever its speed; `tune` drops
what is wrong, and ends with 1 when nothing is left.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from ghl.bench import clock as clocks
from ghl.bench import report, streams, tuning
from ghl.bench.clock import MODES
from ghl.bench.implementations import OURS
from ghl.bench.layers import layers_of
from ghl.bench.measure import DEFINITIONS, Bench, Row, measure, summarize
from ghl_kernels import dispatch
from ghl_kernels.rule import check_choice
from ghl_kernels.tuning import tiles


def device_of(name: str) -> torch.device:
    """ValueError in one line for a device that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}, must be cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}, must be cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}, but torch {torch.__version__} finds no GPU here")
    return device


def check_modes(modes: Sequence[str] | None, known: tuple[str, ...]) -> None:
    """ValueError for one that is not known."""
    for mode in modes or ():
        check_choice("--modes", mode, known)


def check_seconds(option: str, seconds: float) -> None:
    """ValueError for a time in which nothing can be measured."""
    if not seconds > 0:
        raise ValueError(f"{option} is {seconds}, must be above 0")


def check_workloads(workloads: Sequence[str]) -> None:
    """ValueError for one that is not known, before anything is measured."""
    for workload in workloads:
        layers_of(workload)


def wrong(rows: list[Row]) -> list[str]:
    """Refusals of ours for a wrong result; one that does not fit or compile is no error."""
    ours = [row for row in rows if row["implementation"] in OURS]
    return [r for r in report.refusals(ours) if ": wrong: " in r]


def layers(args: argparse.Namespace) -> int:
    """Run `ghl bench layers`."""
    start = time.monotonic()
    if args.resume and not args.out:
        raise ValueError("--resume: expected with --out FILE, the file to go on with")
    check_modes(args.modes, tuple(MODES))
    check_seconds("--seconds", args.seconds)
    check_workloads(args.workloads)
    device = device_of(args.device)
    torch.backends.cudnn.benchmark = True  # what a user who cares for speed sets
    result: dict[str, Any] = report.provenance(device)
    earlier = report.resumed(args.out, result) if args.resume else {}
    with torch.no_grad():
        clock = clocks.clock_for(device)
        ceilings = ceilings_of(clock, earlier)
        result |= {
            "definitions": DEFINITIONS | streams.DEFINITIONS,
            "ceilings": {
                "copy_bytes_per_second": ceilings.bytes_per_second,
                "matmul_flops_per_second": ceilings.flops_per_second,
                "seen_before": clocks.SEEN.get(report.gpu_of(device)),
            },
        }
        bandwidth = earlier.get("summary", {}).get("share_of_copy_bandwidth", {})
        if device.type == "cuda" and not bandwidth:
            bandwidth = streams.shares(clock, ceilings)

        def write(rows: list[Row], unfinished: list[str]) -> None:
            summary = {**summarize(rows, unfinished), "share_of_copy_bandwidth": bandwidth}
            content = {**result, "summary": summary, "unfinished": unfinished}
            if args.out:
                report.write_json(args.out, {**content, "layers": rows})

        bench = Bench(clock, ceilings, start + args.seconds)
        rows, unfinished = measure(
            bench, args.workloads, write, earlier.get("layers", ()), args.modes
        )
    write(rows, unfinished)
    print_report(rows, ceilings, unfinished)
    for name, share in bandwidth.items():
        print(f"share of the copy bandwidth, {name}: {share}")
    return 1 if wrong(rows) else 0


def ceilings_of(clock: clocks.Clock, earlier: dict[str, Any]) -> clocks.Ceilings:
    """Those of the run that is gone on with, or measured now."""
    if not earlier:
        return clocks.ceilings(clock)
    found = earlier["ceilings"]
    return clocks.Ceilings(found["copy_bytes_per_second"], found["matmul_flops_per_second"])


def print_report(rows: list[Row], ceilings: clocks.Ceilings, unfinished: list[str]) -> None:
    for workload in dict.fromkeys(row["workload"] for row in rows):
        print(f"{workload}, p50 in ms")
        for line in report.table([row for row in rows if row["workload"] == workload]):
            print(f"  {line}")
    rates = ", ".join(f"{m} {r / 1e12:.1f} TFLOP/s" for m, r in ceilings.flops_per_second.items())
    print(f"ceilings: copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, {rates}")
    for line in report.refusals(rows):
        print(f"refused: {line}")
    for workload in unfinished:
        print(f"unfinished, out of time: {workload}")
    for line in report.summary_lines(summarize(rows, unfinished)):
        print(line)


def tune(args: argparse.Namespace) -> int:
    """Run `ghl bench tune`."""
    check_modes(args.modes, tuning.TUNED_MODES)
    check_seconds("--budget", args.budget)
    for strategy in args.strategies or ():
        check_choice("--strategies", strategy, tiles.STRATEGIES)
    check_workloads(args.workloads)
    if not torch.cuda.is_available():
        raise ValueError(f"tiles are tuned on a GPU, and torch {torch.__version__} finds none here")
    device = torch.device("cuda")
    some = torch.empty(0, device=device)
    by_triton, by_cuda = (dispatch.unavailable(name, some, None) for name in ("triton", "cuda"))
    if by_triton and by_cuda:
        raise ValueError(f"there is nothing to tune: {by_triton}; {by_cuda}")
    torch.backends.cudnn.benchmark = True
    with torch.no_grad():
        tuned, path = tuning.tune_gpu(
            args.workloads, args.budget, args.out, clocks.clock_for(device), args.modes,
            args.strategies or tuning.TRIED,
        )  # fmt: skip
    if args.log:
        report.write_json(args.log, tuning.as_log(tuned))
    dropped = [a for t in tuned for a in t.attempts if a.dropped]
    for reason in dict.fromkeys(a.dropped for a in dropped):
        print(f"dropped {sum(a.dropped == reason for a in dropped)}: {reason}")
    print(f"{len(tuned)} layers tuned, written to {path}")
    return 0 if any(t.winner for t in tuned) else 1
