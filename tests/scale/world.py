"""Processes that run scenarios together: started once for each number of ranks, not once a test.

A scenario is a function of rank and world; what it raises on any rank is told to the test.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Scenario = Callable[[int, int], None]
MODULES = ("ddp", "autocast", "fsdp", "thawed", "others", "errors")
LIMIT = 300  # seconds for all scenarios of one world, on a busy machine; a hang ends sooner


def scenario(function: Callable[..., None]) -> Callable[..., None]:
    """Mark a function of rank and world as one to run."""
    function.is_scenario = True  # type: ignore[attr-defined]
    return function


def scenarios() -> dict[str, Scenario]:
    """The marked functions of the modules, by 'module.function'."""
    return {
        f"{module}.{name}": function
        for module in MODULES
        for name, function in vars(importlib.import_module(f"tests.scale.{module}")).items()
        if getattr(function, "is_scenario", False)
    }


def work(rank: int, world: int, directory: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=30),
    )  # fmt: skip
    for name, function in scenarios().items():
        start = time.perf_counter()
        try:
            function(rank, world)
            said = "passed"
        except Exception:
            said = traceback.format_exc()
        seconds = time.perf_counter() - start
        Path(directory, f"{name}.{rank}").write_text(f"{seconds:.1f} s: {said}")
        if said != "passed":
            break  # the others may be anywhere now
    dist.destroy_process_group()


@functools.cache
def run(world: int) -> dict[str, list[str]]:
    """What every rank says of every scenario: '… passed' or a traceback."""
    with tempfile.TemporaryDirectory() as directory:
        context = mp.start_processes(
            work, (world, directory), nprocs=world, join=False, start_method="spawn"
        )
        end = time.monotonic() + LIMIT
        while time.monotonic() < end and any(p.is_alive() for p in context.processes):
            time.sleep(0.05)
        for process in context.processes:
            process.kill()

        def said(name: str, rank: int) -> str:
            file = Path(directory, f"{name}.{rank}")
            return file.read_text() if file.exists() else "never came to its end"

        return {name: [said(name, rank) for rank in range(world)] for name in scenarios()}


def assert_equal_on_all_ranks(tensors: list[Any]) -> None:
    """Bit for bit."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, flat)
    for other in gathered:
        assert torch.equal(other, gathered[0]), "weights differ between ranks"


def assert_close(tensors: list[Any], expected: list[Any], rounding: float = 1e-11) -> None:
    for number, (given, right) in enumerate(zip(tensors, expected, strict=True)):
        difference = (given.detach() - right).abs().max().item()
        assert difference < rounding, f"parameter {number} is off by {difference:.2g}"
