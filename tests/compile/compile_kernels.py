"""Compiles kernels for GPUs that are not there, one line of JSON for each; run as a program.

The launchers of the package run on tensors without memory; a launch is what is replaced, so types,
alignment and constants are those of a real one. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import triton
from compile_cases import Case, cases, launch_case
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ghl_kernels.tuning.tiles import Tile

WORKERS = 2
EVENTS = (
    "wgmma.mma_async",
    "wgmma.wait_group",
    "tcgen05.mma",
    "mma.sync",
    "ex2.approx",
    "cp.async.cg",
    "cp.async.ca",
    "cp.async.bulk.tensor",
)


class NoDriver:
    """What Triton asks of a GPU before it compiles; a device's number is its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def compiled_instead_of_launched(arch: int, names: tuple[str, ...]) -> Iterator[list[Any]]:
    """Inside, a launch of one of these kernels compiles it for `arch`, and any other is nothing."""
    compiled: list[Any] = []
    launch = JITFunction.__getitem__

    def compile_only(kernel: JITFunction, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> None:
            if kernel.__name__ in names:
                compiled.append(kernel.run(*args, grid=grid, warmup=True, **options))

        return run

    driver.set_active(NoDriver(arch))
    JITFunction.__getitem__ = compile_only
    try:
        yield compiled
    finally:
        JITFunction.__getitem__ = launch


def tool(name: str, *arguments: str) -> str:
    """What one of the CUDA tools that Triton brings says."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and of local memory: not 0 if it spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert found, usage
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def events(ptx: str) -> list[str]:
    """The instructions of EVENTS in their order, those in a row once; wgmma of a product is one."""
    found: list[str] = []
    for line in ptx.splitlines():
        name = next((name for name in EVENTS if name in line), None)
        if name and found[-1:] != [name]:
            found.append(name)
    return found


def report(kernel: Any) -> dict[str, Any]:
    """What the compiler says of a kernel: its resources, and which instructions it has."""
    ptx = kernel.asm["ptx"]
    first_operands = re.findall(r"wgmma\.mma_async\S*\s*\{[^}]*\},\s*(\S+)", ptx)
    return {
        "kernel": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        **resources(kernel.asm["cubin"]),
        "instructions": {name: ptx.count(name) for name in EVENTS},
        "fed_by_registers": sum(operand.startswith("{") for operand in first_operands),
        "events": events(ptx),
    }


def compile_case(case: Case) -> list[dict[str, Any]]:
    """The report of each kernel of a case, or of what the compiler said instead."""
    fields = {**dataclasses.asdict(case.tile), **dataclasses.asdict(case), "case": str(case)}
    try:
        with compiled_instead_of_launched(case.arch, case.kernels) as compiled:
            launch_case(case)
        assert compiled, "no kernel was launched"
        return [{**fields, "error": None, **report(kernel)} for kernel in compiled]
    except Exception as error:
        return [{**fields, "error": f"{type(error).__name__}: {error}"[:2000]}]


def main() -> None:
    """Arguments: words that a case must contain, such as sm90; or --tile and a tile's numbers."""
    wanted = [case for case in cases() if all(word in str(case) for word in sys.argv[1:])]
    if sys.argv[1:2] == ["--tile"]:
        wanted = [Case(90, "pointwise", 16, Tile(*map(int, sys.argv[2:])), "statistics")]
    with ProcessPoolExecutor(WORKERS) as pool:
        for reports in pool.map(compile_case, wanted):
            for line in reports:
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
