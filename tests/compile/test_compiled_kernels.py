"""Every kernel and every tile of the shipped tables, by the compiler's own report; no GPU runs.

What is compiled, and how, is in `compile_cases.py` and `compile_kernels.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

Report = dict[str, Any]
HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # sm80.json serves 8.6 as well
REGISTERS = 65536
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def environment_with(cache: Path) -> dict[str, str]:
    """That of a process whose Triton compiles, into this cache."""
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    environment["TRITON_CACHE_DIR"] = str(cache)
    path = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(reversed(list(filter(None, path))))
    return environment


def compile_kernels(cache: Path, *words: str) -> list[Report]:
    """Reports of the cases whose names contain the words, compiled anew."""
    command = [sys.executable, str(HERE / "compile_kernels.py"), *words]
    result = subprocess.run(command, env=environment_with(cache), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    found = compile_kernels(tmp_path_factory.mktemp("triton"))
    errors = [f"{r['case']}: {r['error']}" for r in found if r["error"]]
    assert not errors, "\n".join(errors)
    return found


def named(reports: list[Report], fails: Callable[[Report], object]) -> dict[str, object]:
    """What is wrong, by case."""
    return {f"{r['case']} {r['kernel']}": fails(r) for r in reports if fails(r)}


def products(reports: list[Report]) -> Iterator[Report]:
    """The kernels of weight gradients whose products are for tensor cores."""
    for r in reports:
        if r["form"] != "rest" and r["kind"] != "depthwise" and r["precision"] != "ieee":
            yield r


def instruction(r: Report) -> str:
    """A tensor core's; tiles of fewer than 64 columns are too small for the newer ones."""
    return TENSOR_CORE[r["arch"] if r["block_c"] >= 64 else 80]


def test_every_kernel_is_compiled_for_every_architecture(reports: list[Report]) -> None:
    kernels = {arch: {r["kernel"] for r in reports if r["arch"] == arch} for arch in TENSOR_CORE}
    assert kernels[80] == kernels[90] == kernels[100]
    sources = (REPOSITORY / "ghl_kernels" / "triton").glob("*.py")
    written = {
        line.split("(")[0].removeprefix("def ")
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert kernels[90] == written


def test_nothing_spills(reports: list[Report]) -> None:
    """The kernels without products may keep four numbers aside, as around a division's call."""

    def spilled(r: Report) -> int:
        return r["local"] + max(0, r["stack"] - 16 * (r["form"] == "rest"))

    assert not named(reports, spilled)


def test_shared_memory_is_there(reports: list[Report]) -> None:
    assert not named(reports, lambda r: max(0, r["shared"] - SHARED_MEMORY[r["arch"]]))


def test_both_products_are_for_tensor_cores(reports: list[Report]) -> None:
    def wrong(r: Report) -> str | None:
        name = instruction(r)
        others = [other for other in TENSOR_CORE.values() if other != name]
        pure = not any(r["instructions"][other] for other in others)
        return None if r["instructions"][name] >= 2 and pure else f"{r['instructions']}"

    assert not named(list(products(reports)), wrong)


def test_products_take_their_operands_from_shared_memory(reports: list[Report]) -> None:
    assert not named(reports, lambda r: r["fed_by_registers"])


def test_loads_run_ahead_of_products(reports: list[Report]) -> None:
    """By cp.async or the copy engine; 16-bit numbers that are not aligned cannot."""

    def waits(r: Report) -> bool:
        ahead = "cp.async.bulk.tensor" if r["descriptors"] else "cp.async"
        return not any(n for name, n in r["instructions"].items() if name.startswith(ahead))

    assert not named([r for r in products(reports) if r["aligned"]], waits)


def test_exponentials_run_beside_the_first_product(reports: list[Report]) -> None:
    """On sm_90 nothing waits between them, where the columns of a tile are of one tap."""

    def serial(r: Report) -> str | None:
        events = [name for name in r["events"] if not name.startswith("cp.async")]
        first = ["wgmma.mma_async", "ex2.approx", "wgmma.mma_async"]
        return None if events[:3] == first else " ".join(events)

    pipelined = [
        r
        for r in products(reports)
        if r["arch"] == 90 and instruction(r) == TENSOR_CORE[90]
        if r["aligned"] and r["kind"] != "packed" and r["form"] != "stored"
    ]
    assert pipelined
    assert not named(pipelined, serial)


def test_as_many_programs_as_a_table_says_fit_a_multiprocessor(reports: list[Report]) -> None:
    """Registers are given out by eights; a program takes 1 KiB of shared memory for itself."""
    limits = {80: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024}

    def too_many(r: Report) -> str | None:
        of_thread = -(-r["registers"] // 8) * 8
        fit = min(
            REGISTERS // (of_thread * 32 * r["warps"]), limits[r["arch"]] // (r["shared"] + 1024)
        )
        return f"{r['programs']} > {fit}" if r["programs"] > fit else None

    assert not named([r for r in reports if r["form"] != "rest"], too_many)


def test_the_report_finds_a_tile_that_spills(tmp_path: Path) -> None:
    (report,) = compile_kernels(tmp_path, "--tile", "64", "256", "128", "8", "2")
    assert report["stack"] > 0
    assert report["error"] is None
