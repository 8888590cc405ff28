"""Cells of an experiment: computed in parallel processes, each result one file, never half written.

What a cell computes is its experiment's; here is what is already done, what is left, and how long
that will take.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ghl.recipes import interrupts
from ghl_kernels.files import write_text

_computing = threading.Lock()


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


def compute(cell: Cell, out: Path) -> dict[str, Any]:
    """The cell's result with its wall and CPU seconds, written where `finished` finds it.

    On one thread: cells run side by side.
    """
    torch.set_num_threads(1)
    module, _, name = cell.function.partition(":")
    with _computing:
        wall, cpu = time.perf_counter(), time.process_time()
        result = getattr(importlib.import_module(module), name)(**cell.arguments)
        found = {
            **cell.key(),
            "result": result,
            "wall_seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "torch": torch.__version__,
        }
        write_text(path_of(out, cell), json.dumps(found, indent=1) + "\n")
    return found


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

    An interrupt (Ctrl-C or SIGTERM), or the death of this process, lets several processes finish
    the cells in progress and loses none; a second interrupt, or that of a single one, loses those.
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
        results[cell.name] = result
        bar.update(cell.cost)
        bar.set_postfix_str(f"{len(results)}/{len(cells)} {cell.name}")

    # a scheduler ends a job by SIGTERM
    with bar, interrupts.heard(signal.SIGINT, signal.SIGTERM):
        if processes == 1:
            for cell in left:
                keep(cell, compute(cell, out))
                interrupts.check()
        elif left:
            _run_parallel(left, out, processes, keep)
    return results


def _run_parallel(
    left: Sequence[Cell], out: Path, processes: int, keep: Callable[[Cell, dict[str, Any]], None]
) -> None:
    """The costliest first, so that no process is left alone with one at the end."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, end_with_parent)
    waiting = sorted(left, key=lambda c: c.cost)
    running: dict[concurrent.futures.Future, Cell] = {}
    interrupted = False
    try:
        while running or waiting:
            try:
                if not interrupted:
                    interrupts.check()
                # no more than there are processes: what a pool has queued it cannot take back
                while waiting and len(running) < processes:
                    with interrupts_held():
                        cell = waiting.pop()
                        running[pool.submit(compute, cell, out)] = cell
                done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                for future in done:
                    keep(running.pop(future), future.result())
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                waiting.clear()
                names = ", ".join(cell.name for cell in running.values())
                print(f"\nInterrupted: finishing {names}; once more to drop them", file=sys.stderr)
        if interrupted:
            raise KeyboardInterrupt
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Let a process of the pool end when its parent is gone and its cell is written.

    A pool's processes wait for their next task for ever, as each holds both ends of the queue.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        with _computing:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits; the processes that are started inside never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
