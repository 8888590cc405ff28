"""Turns pytest-benchmark's file into a result worth committing, and prints its table.

`python -m bench.report build/benchmark.json`: writes bench/results/<machine>.json, with the
versions, the commit and the hash of the kernel sources that it was measured with.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from ghl.bench import report
from ghl.bench.clock import Timing
from ghl_kernels import library

RESULTS = Path(__file__).parent / "results"


def machine_name() -> str:
    """Architecture, vector instructions and threads: what a CPU result depends on most."""
    compiled = library.serving("cpu")
    if compiled is None or not compiled.loaded:
        raise RuntimeError("the CPU library is not loaded: there is nothing to measure")
    module = library.introspection()
    assert module is not None
    instructions = module.instruction_set(str(compiled.path))
    return f"cpu-{platform.machine()}-{instructions}-{torch.get_num_threads()}threads"


def provenance() -> dict[str, Any]:
    head, dirty = report.commit()
    module = library.introspection()
    return {
        "schema": report.SCHEMA,
        "machine": machine_name(),
        "processor": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": head,
        "uncommitted_changes": dirty,
        "kernel_source_hash": module.source_hash if module else None,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def row(benchmark: dict[str, Any]) -> dict[str, Any]:
    info = benchmark["extra_info"]
    timing = Timing("wall clock", tuple(sorted(1e3 * t for t in benchmark["stats"]["data"])))
    return {
        **info,
        "rounds": len(timing.times),
        "p20_ms": timing.percentile(0.2),
        "p50_ms": timing.p50,
        "p80_ms": timing.percentile(0.8),
        "gflops_per_second": info["flops"] / timing.p50 / 1e6,
        "share_of_floor": info["floor_ms"] / timing.p50,
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median time of each baseline over ours, by case, and their geometric mean."""
    p50 = {(r["case"], r["implementation"]): r["p50_ms"] for r in rows}
    cases = dict.fromkeys(r["case"] for r in rows)
    result: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(r["implementation"] for r in rows if r["implementation"] != "ghl"):
        by_case = {case: p50[case, name] / p50[case, "ghl"] for case in cases}
        mean = math.exp(sum(map(math.log, by_case.values())) / len(by_case))
        result[name] = {**by_case, "geometric_mean": mean}
    return result


def print_table(rows: list[dict[str, Any]], summary: dict[str, dict[str, float]]) -> None:
    print(f"{'case':<17} {'implementation':<17}    p50 ms  floor %  peak MB  x ours")
    for r in rows:
        ratio = summary.get(r["implementation"], {}).get(r["case"], 1.0)
        print(
            f"{r['case']:<17} {r['implementation']:<17} {r['p50_ms']:9.2f} "
            f"{100 * r['share_of_floor']:8.0f} {r['peak_transient_bytes'] / 1e6:8.1f} {ratio:7.2f}"
        )
    for name, by_case in summary.items():
        print(f"geometric mean of {name} over ours: {by_case['geometric_mean']:.2f}")


def main() -> None:
    benchmarks = json.loads(Path(sys.argv[1]).read_text())["benchmarks"]
    rows = [row(benchmark) for benchmark in benchmarks]
    summary = ratios(rows)
    print_table(rows, summary)
    result = {**provenance(), "summary": summary, "layers": rows}
    path = RESULTS / f"{result['machine']}.json"
    report.write_json(path, result)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
