"""Cells of an experiment: computed in parallel processes, each result one file, never half written.

What a cell computes is its experiment's; here is what is already done, what is left, and how long
that will take.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ghl.recipes.checkpoint import write_text


@dataclass(frozen=True)
class Cell:
    """One unit of work: `function` (as "module:name") of keyword arguments that JSON can hold.

    cost: its expected share of the time, in any unit, for the estimate of the time left.
    """

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    cost: float = 1.0

    def key(self) -> dict[str, Any]:
        """What its result depends on."""
        return {"function": self.function, "arguments": self.arguments}


def compute(cell: Cell) -> dict[str, Any]:
    """The cell's result with its wall and CPU seconds; on one thread, cells run side by side."""
    torch.set_num_threads(1)
    module, _, name = cell.function.partition(":")
    wall, cpu = time.perf_counter(), time.process_time()
    result = getattr(importlib.import_module(module), name)(**cell.arguments)
    return {
        **cell.key(),
        "result": result,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "torch": torch.__version__,
    }


def path_of(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.name}.json"


def finished(out: Path, cell: Cell) -> dict[str, Any] | None:
    """The stored result of a cell; None if there is none, or it is of other settings."""
    path = path_of(out, cell)
    if not path.is_file():
        return None
    stored = json.loads(path.read_text())
    wanted = json.loads(json.dumps(cell.key()))
    return stored if {k: stored.get(k) for k in wanted} == wanted else None


def run(cells: Sequence[Cell], out: Path, processes: int, label: str) -> dict[str, dict[str, Any]]:
    """Results by name of the cell; those stored in `out` by an earlier run are not computed again.

    An interrupt loses the cells in progress, at most one for each process.
    """
    results = {c.name: stored for c in cells if (stored := finished(out, c)) is not None}
    left = [c for c in cells if c.name not in results]
    (out / "cells").mkdir(parents=True, exist_ok=True)
    if results and left:
        print(f"{label}: {len(results)} of {len(cells)} cells are there already")
    bar = tqdm(
        total=sum(c.cost for c in cells),
        initial=sum(c.cost for c in cells if c.name in results),
        desc=label,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left {postfix}",
        disable=not left,
    )

    def keep(cell: Cell, result: dict[str, Any]) -> None:
        write_text(path_of(out, cell), json.dumps(result, indent=1) + "\n")
        results[cell.name] = result
        bar.update(cell.cost)
        bar.set_postfix_str(f"{len(results)}/{len(cells)} {cell.name}")

    with bar:
        if processes == 1:
            for cell in left:
                keep(cell, compute(cell))
        else:
            _run_parallel(left, processes, keep)
    return results


def _run_parallel(left: Sequence[Cell], processes: int, keep: Any) -> None:
    """The costliest first, so that no process is left alone with one at the end."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context)
    try:
        waiting = {pool.submit(compute, c): c for c in sorted(left, key=lambda c: -c.cost)}
        for future in concurrent.futures.as_completed(waiting):
            keep(waiting[future], future.result())
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
