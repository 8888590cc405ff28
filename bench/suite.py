"""What `bench/gpu_suite.sh` runs: its stages, and the result that is made of what they leave.

Imports nothing that could be broken. The result is written whatever happened, and says what did;
the exit status is that of the tests and the checks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import sanitizers
from bench.stages import ROOT, Stage, Suite

SECONDS = 570  # of the ten minutes that one command may take
SCHEMA = 1
DONE = "done.json"  # how the stages went, and on which sources
STEPS = {
    "train_step": "resnet50_b256_eager",
    "train_step_compiled": "resnet50_b256",
    "train_step_reduced": "resnet50_b256_reduce_overhead",
    "train_step_captured": "resnet50_b256_captured",
}
PROVENANCE = (
    "import json, torch; from ghl.bench.report import provenance; "
    "print(json.dumps(provenance(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))))"
)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# those of tests/cuda that need no GPU build a library of their own, for minutes
TESTS = (
    "triton", "cuda/test_gpu_cuda.py", "cuda/test_choice.py", "scale/test_on_gpu.py",
    "kernels/test_player.py", "kernels/test_compiled_tapes.py",
)  # fmt: skip


def stages(work: Path, out: Path, dry: bool) -> list[Stage]:
    """All stages in their order; `dry` ones do on a CPU and in seconds what they can."""
    python = sys.executable
    many = ["-n", "12", "--dist", "worksteal"] if has("xdist") and not dry else []
    tests = [f"tests/{name}" for name in TESTS]
    pytest = [python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *many]
    pip = [python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
    bench = [python, "-m", "ghl", "bench"]
    device = "cpu" if dry else "cuda"
    measured = [*bench, "layers", "--device", device, "--resume"]
    measured += ["--out", f"{work}/measured.json"]
    tune = [*bench, "tune", "--log", f"{out}/tune.json", "--budget", "{seconds}"]
    first = [python, "-m", "bench.first_update", "--device", device, "--out", f"{work}/first.json"]
    train = [python, "-m", "bench.train_step", "--amp", "bf16", "--channels-last"]
    compiled = {
        "train_step_compiled": ["--contestants", "bp", "ghl"],  # a third has no time to compile
        "train_step_reduced": ["--mode", "reduce-overhead", "--contestants", "bp", "synchronized"],
    }
    monitor = [python, "-m", "bench.alignment_overhead", "--device", "cuda"]
    monitor += ["--out", f"{work}/monitor.json"]
    if dry:
        pip = [python, "-c", "print('install: not in a dry run')"]
        pytest, tests = [python, "-m", "pytest", "-q"], ["tests/kernels/test_rule.py"]
        measured += ["deephebb_b1"]
        first += ["--batch", "1"]
    tables = {"XDG_CACHE_HOME": str(work / "cache")}  # what is tuned here is what is measured
    interpret = {"TRITON_INTERPRET": "1"} if dry else {}
    missing = None if sanitizers.tool() else "compute-sanitizer is not installed"
    no_gpu = "a dry run" if dry else None
    kernels = (python, "-W", "ignore", "-m", "bench.sanitize", "--device", device)
    sanitize = (python, "-m", "bench.sanitizers", str(work))
    eager = (*train, "--out", f"{work}/train_step.json")
    captured = (*train, "--graph", "--out", f"{work}/train_step_captured.json")
    ahead = (python, "-m", "bench.compile_ahead")
    # choices between kernels that are made beside other work are not kept
    no_choice = {"TORCHINDUCTOR_AUTOTUNE_LOCAL_CACHE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    return [
        Stage("install", tuple(pip), 150, 30),
        Stage("tests", (*pytest, *tests), 165, 120, beside="checks"),
        Stage("kernels", kernels, 75, environment=interpret, beside="checks"),
        Stage("sanitize", sanitize, 150, skipped=no_gpu or missing, beside="checks"),
        # when there are cores for it; short of memory, it leaves a layer to the measurement
        Stage("compile_layers", ahead, 110, checks=False, environment=no_choice, skipped=no_gpu,
              beside="checks", after="sanitize"),
        # a minute or more of compiling, by one core mostly, for seconds of steps
        *(
            Stage(name, (*train, "--compile", *options, "--out", f"{work}/{name}.json",
                         "--when", f"{work}/{name}.ready", f"{work}/{name}.gate"),
                  195, 10, checks=False, environment=tables | no_choice, skipped=no_gpu,
                  beside="checks", gate=work / f"{name}.gate")
            for name, options in compiled.items()
        ),
        Stage("tune", tuple(tune), 110, 60, skipped=no_gpu, environment=tables),
        Stage("first_update", tuple(first), 60, 20, checks=False, environment=tables),
        Stage("train_step", eager, 60, 25, checks=False, environment=tables, skipped=no_gpu),
        Stage("train_step_captured", captured, 60, 25, checks=False, environment=tables,
              skipped=no_gpu),
        Stage("monitor", tuple(monitor), 80, 30, checks=False, skipped=no_gpu),
        # last, because it ends at any time with what it has
        Stage("measure", (*measured, "--seconds", "{seconds}"), 400, 130, environment=tables),
    ]  # fmt: skip


def sources() -> str:
    """The hash of what is tested and measured."""
    file = Path(__file__).resolve().parent.parent / "ghl_kernels" / "source_hash.py"
    return str(runpy.run_path(str(file))["gpu_source_hash"]())


def clear(work: Path, chosen: Sequence[Stage] = ()) -> list[dict[str, Any]]:
    """Remove what earlier runs have left, and tell what is kept: of stages that are not `chosen`,
    if there are any, what a run on the same sources has found."""
    done = read(work / DONE) or {}
    kept = []
    if chosen and done.get("sources") == sources():
        again = {stage.name for stage in chosen}
        kept = [stage for stage in done["stages"] if stage["name"] not in again]
        anew = [stage.command for stage in chosen if "--resume" not in stage.command]
        old = {Path(word) for command in anew for word in command if word.startswith("/")}
    else:
        old = {*work.glob("*.json"), *work.glob("*.log")}
    for path in old:
        if path.parent == work:
            path.unlink(missing_ok=True)
    return kept


def read(path: Path) -> Any:
    """A stage's JSON; None if it left none, or none that is whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def where() -> dict[str, Any]:
    """Where and with what, if no measurement says so; little, if the package does not import."""
    command = [sys.executable, "-c", PROVENANCE]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        return dict(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {"schema": SCHEMA, "gpu": "unknown", "date": time.strftime("%Y-%m-%d")}


def assemble(suite: Suite) -> dict[str, Any]:
    """The result: where, the stages, what was measured and its summary."""
    result = dict(read(suite.work / "measured.json") or where())
    result["stages"] = suite.results
    result["checks_passed"] = passed(suite.results)
    summary = result.setdefault("summary", {})
    first = read(suite.work / "first.json")
    if first:
        summary["first_update_seconds"] = first
    steps = {name: read(suite.work / f"{name}.json") for name in STEPS}
    if any(steps.values()):
        summary["train_step"] = {key: steps[n]["ratios"] for n, key in STEPS.items() if steps[n]}
        result["train_steps"] = [
            {"settings": step["settings"], "rows": step["rows"]} for step in steps.values() if step
        ]
    monitor = read(suite.work / "monitor.json")
    if monitor:
        summary["monitor"] = monitor
    result["layers"] = result.pop("layers", [])  # the long part last
    return result


def passed(results: Sequence[dict[str, Any]]) -> bool:
    return all(stage["ok"] is not False for stage in results if stage["checks"])


def file_name(gpu: str) -> str:
    """As the tables of tiles are called: nvidia-h200."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())


def finish(suite: Suite, results: Path) -> Path:
    """Write the result, and copy what was tuned, to where they come back from."""
    result = assemble(suite)
    path = results / f"{file_name(result['gpu'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    done = {"sources": sources(), "stages": suite.results}
    (suite.work / DONE).write_text(json.dumps(done) + "\n")
    for table in (suite.work / "cache").rglob("tables/*.json"):
        shutil.copy(table, suite.out / f"table-{table.name}")
    return path


def print_table(result: dict[str, Any]) -> None:
    """One line for each entry of the summary."""
    for name, found in result.get("summary", {}).items():
        numbers = [f"{k} {v:.2f}" for k, v in found.items() if isinstance(v, int | float)]
        for key, inner in found.items():
            if isinstance(inner, dict):
                told = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in inner.values())
                numbers.append(f"{key} {' '.join(told)}")
        print(f"{name:<20} {', '.join(numbers)}")


def main(argv: Sequence[str] | None = None, make: Callable[..., list[Stage]] = stages) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in a minute")
    parser.add_argument("--stages", help="only these, separated by commas; of the others, what an "
                        "earlier run on the same sources has left")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    args = parser.parse_args(argv)
    work = ROOT / "build" / "gpu_suite"
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else work
    for directory in (work, out):
        directory.mkdir(parents=True, exist_ok=True)
    to_results = out if os.environ.get("OUT") or args.dry_run else ROOT / "bench" / "results"
    chosen = make(work, out, args.dry_run)
    if args.stages:
        names = args.stages.split(",")
        if unknown := set(names) - {stage.name for stage in chosen}:
            parser.error(f"--stages: there is no stage {', '.join(sorted(unknown))}")
        chosen = [stage for stage in chosen if stage.name in names]
    earlier = clear(work, chosen if args.stages else ())
    if any(stage.name == "tune" and not stage.skipped for stage in chosen):
        shutil.rmtree(work / "cache", ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (out / "suite.log").open("w") as log:
        until, scale = time.monotonic() + args.seconds, args.seconds / SECONDS
        suite = Suite(out, work, until, log, scale, earlier)
        try:
            suite.run(chosen)
        finally:
            measured = (work / "measured.json").exists()
            path = finish(suite, to_results if measured else out)
            print_table(json.loads(path.read_text()))
            print(f"checks {'passed' if passed(suite.results) else 'FAILED'}; written to {path}")
    return 0 if passed(suite.results) else 1


if __name__ == "__main__":
    sys.exit(main())
