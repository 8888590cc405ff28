"""Where a measurement comes from, how it is printed, and how it is written: whole or not at all."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ghl.bench.measure import Row
from ghl_kernels.files import write_text
from ghl_kernels.source_hash import gpu_source_hash
from ghl_kernels.tapes import player

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[3]


def command(*words: str) -> str | None:
    """What a command prints; None if it fails or is not there."""
    try:
        done = subprocess.run(
            words, cwd=ROOT, check=True, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> tuple[str, bool | None]:
    """The commit and whether kernels differ from it; GHL_COMMIT where a copy's git is another's."""
    told = os.environ.get("GHL_COMMIT")
    head = told or command("git", "rev-parse", "HEAD")
    if told or head is None:
        return head or "unknown", None
    changes = command("git", "status", "--porcelain", "--", "csrc", "ghl_kernels", "python")
    return head, bool(changes)


def driver() -> str | None:
    found = command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def gpu_of(device: torch.device) -> str:
    """The GPU's name, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def provenance(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code, and which code it was."""
    head, dirty = commit()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return {
        "schema": SCHEMA,
        "gpu": gpu_of(device),
        "driver": driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "tapes_played_by": player.by_whom(),
        "commit": head,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source_hash": gpu_source_hash(),
    }


OF_THE_SAME = "schema", "gpu", "driver", "torch", "triton", "cuda", "source_hash"


def resumed(path: Path, here: dict[str, Any]) -> dict[str, Any]:
    """What a run on this GPU, with these versions and sources, has left in a file; empty if that is
    another's, or is not there."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    alike = isinstance(found, dict) and all(found.get(key) == here[key] for key in OF_THE_SAME)
    return found if alike else {}


def write_json(path: Path, content: object) -> None:
    """Atomically, so that a run that is stopped leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n", shared=True)


def table(rows: Sequence[Row]) -> list[str]:
    """One line per layer and mode: each implementation's milliseconds, then what ran and how near
    the floor."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    heads = "".join(f"{name[-9:]:>10}" for name in names)
    lines = [f"{'layer':<24}{'shape':<34}{'mode':<9}{heads}   floor"]
    by_line: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_line.setdefault((row["layer"], row["mode"]), {})[row["implementation"]] = row
    for (layer, mode), of in by_line.items():
        first, mine = next(iter(of.values())), of.get("ghl", {})
        cells = "".join(f"{cell(of.get(name)):>10}" for name in names)
        label = f"{layer} x{first.get('count', 1)}"
        share = f"{100 * mine['share_of_floor']:7.0f}%" if "share_of_floor" in mine else ""
        lines.append(
            f"{label:<24}{first.get('shape', ''):<34}{mode:<9}{cells}{share} {mine.get('ran', '')}"
        )
    return lines


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['p50_ms']:.4f}" if "p50_ms" in row else "refused"


def summary_lines(summary: dict[str, dict[str, Any]]) -> list[str]:
    """One line per workload: its ratios."""
    lines = []
    for workload, found in summary.items():
        ratios = [
            f"{key} {value:.2f}" for key, value in found.items() if isinstance(value, int | float)
        ]
        lines.append(f"{workload}: {', '.join(ratios)}")
    return lines


def refusals(rows: Sequence[Row]) -> list[str]:
    """Why rows have no time: each reason once for an implementation, with the first row's layer."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "refused" in row:
            found.setdefault((row["implementation"], row["refused"]), []).append(row)
    return [
        f"{name}, {len(of)} rows, first {of[0]['workload']} {of[0]['layer']} {of[0]['mode']}: "
        f"{reason}"
        for (name, reason), of in found.items()
    ]
