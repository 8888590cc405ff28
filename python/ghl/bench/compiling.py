"""Compiles a tuner's candidates beforehand, by several processes.

That takes ten times as long as timing; kernels compiled ahead of time run there once. A candidate
that fails there, or of the latter one that gives no answer, is not tried by the tuner.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

import ghl_kernels
from ghl.bench.clock import MODES, precision
from ghl.bench.implementations import Tensors, ours_call
from ghl.bench.layers import Layer
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import Entry

COMPILE_BATCH = 16  # images: sizes and strides of the kernel's arguments stay as divisible by 16
COMPILE_ROWS = 4096
MOST_PROCESSES = 12
START = "spawn"  # CUDA does not survive a fork
Job = tuple[Layer, str, Entry]


def small(layer: Layer) -> Layer:
    """The same layer for fewer rows: what it compiles is the same."""
    most = COMPILE_ROWS if layer.linear else COMPILE_BATCH
    return dataclasses.replace(layer, batch=min(layer.batch, most))


def compiled_alike(layer: Layer, mode: str, entry: Entry) -> tuple[Any, ...]:
    """Jobs for which this is equal compile the same kernels, as far as is known here."""
    whole_rows = entry.tile.holds_rows(entry.neurons, layer.groups)
    divisible = tuple(n % 16 == 0 for n in (entry.neurons, entry.columns, layer.in_channels))
    geometry = layer.linear, layer.kernel_size, layer.stride, layer.groups == 1
    return entry.kind, mode, entry.strategy, entry.tile, whole_rows, divisible, geometry


def run_once(layer: Layer, mode: str, entry: Entry, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    with tiles.use(entry), ghl_kernels.force(entry.strategy), precision(mode):
        return ours_call(layer, tensors, "update")()


def compile_job(job: Job) -> str | None:
    """Why a candidate does not compile or launch, None if it does."""
    layer, mode, entry = job
    try:
        run_once(layer, mode, entry, small(layer).tensors(MODES[mode], torch.device("cuda")))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:  # a compiler or a driver raises what it likes
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def work(
    jobs: Sequence[Job], results: Connection, compile_one: Callable[[Job], str | None]
) -> None:
    """A process: tell the outcome of each job, and end after one that lost it the GPU."""
    torch.set_num_threads(1)
    for job in jobs:
        reason = compile_one(job)
        lost = reason is not None and not gpu_answers()
        results.send((reason, lost))
        if lost:
            return


def gpu_answers() -> bool:
    """Whether this process can still use the GPU: no kernel can after an illegal access."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@dataclasses.dataclass
class Worker:
    """A process and the jobs it has not told the outcome of."""

    jobs: list[Job]
    process: Any
    results: Connection

    @classmethod
    def start(cls, jobs: list[Job], compile_one: Callable[[Job], str | None]) -> Worker:
        context: Any = multiprocessing.get_context(START)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(jobs, theirs, compile_one), daemon=True)
        process.start()
        theirs.close()
        return cls(jobs, process, ours)

    def outcome(self) -> tuple[str | None, bool]:
        """What is wrong with the first job, and whether the process ends over it."""
        try:
            reason, lost = self.results.recv()
        except EOFError:
            return "the compiler or the GPU ended the process", True
        return reason, lost


def compile_all(
    jobs: Sequence[Job], seconds: float, compile_one: Callable[[Job], str | None] = compile_job
) -> dict[tuple[Any, ...], str]:
    """Compile into Triton's cache by several processes; the candidates that failed, and why.

    What is not compiled when the time is over compiles when it is tried.
    """
    deadline = time.monotonic() + seconds
    ours = (job for job in jobs if job[2].strategy not in tiles.BY_OTHERS)
    alike = {compiled_alike(*job): job for job in ours}
    todo, failed = list(alike.values()), {}
    number = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2, len(todo)))
    parts = [todo[i::number] for i in range(number)]
    workers = {w.results: w for w in (Worker.start(p, compile_one) for p in parts if p)}
    try:
        while workers and (left := deadline - time.monotonic()) > 0:
            for ready in wait(list(workers), left):
                worker = workers[ready]  # type: ignore[index]
                (reason, lost), job = worker.outcome(), worker.jobs.pop(0)
                if reason:
                    failed[compiled_alike(*job)] = reason
                if lost or not worker.jobs:
                    del workers[worker.results]
                if lost and worker.jobs:
                    following = Worker.start(worker.jobs, compile_one)
                    workers[following.results] = following
    finally:
        for worker in workers.values():
            worker.process.kill()
            unanswered = (job for job in worker.jobs if job[2].strategy in tiles.BY_CUDA)
            failed.update((compiled_alike(*job), "no answer in time") for job in unanswered)
    return failed
