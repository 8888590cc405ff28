"""Experiment 3, the exact case: linear regression under weight noise against its closed form.

The expectation over the noise is not sampled: ⟨S, B⟩ is quadratic in w, so that the mean over
v ± σ√d e_i is exact. The Monitor measures it, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from ghl.alignment import Monitor
from ghl.recipes.figures import save_figure
from ghl.recipes.reproduce.cells import Cell
from ghl.recipes.reproduce.phase import regression_alignment
from ghl.recipes.reproduce.report import Section, write_csv

NOISES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
INPUTS, EXAMPLES = 8, 16


def measured(x: torch.Tensor, y: torch.Tensor, v: torch.Tensor, noise: float) -> float:
    """The mean of ⟨S, B⟩ over the rows, as a Monitor has it, expected over the noise of w."""
    layer = nn.Linear(len(v), 1, bias=False).to(x.dtype)
    model = nn.Sequential(layer)
    values = []
    with Monitor(model, statistic="sample") as monitor:
        for unit in torch.eye(len(v), dtype=x.dtype):
            for side in (1, -1):
                model.zero_grad()
                with torch.no_grad():
                    layer.weight.copy_(v + side * noise * math.sqrt(len(v)) * unit)
                (model(x)[:, 0] - y).square().mean().div(2).backward()
                part = monitor.report()["0"]["sample"]
                values.append(part["inner"])
    return sum(values) / len(values)


def cell(seed: int) -> dict[str, Any]:
    """Monitor and formula at every noise, for one problem in which v is not the solution."""
    generator = torch.Generator().manual_seed(seed)
    x, y, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((EXAMPLES, INPUTS), (EXAMPLES,), (INPUTS,))
    )
    closed = [float(regression_alignment(x, y, v, noise).mean()) for noise in NOISES]
    return {"closed": closed, "measured": [measured(x, y, v, noise) for noise in NOISES]}


def cells(settings: Any) -> list[Cell]:
    """One cell a seed."""
    function = "ghl.recipes.reproduce.regression:cell"
    return [Cell(f"regression-{s}", function, {"seed": s}) for s in range(settings.seeds)]


def summarize(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
    """Write regression.csv and regression.png; the section of the report."""
    rows = [
        [stored["arguments"]["seed"], noise, closed, found, abs(found - closed) / abs(closed)]
        for stored in results.values()
        for noise, closed, found in zip(
            NOISES, stored["result"]["closed"], stored["result"]["measured"], strict=True
        )
    ]
    head = ["seed", "noise", "closed_form", "monitor", "relative_error"]
    write_csv(out / "regression.csv", head, rows)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    first = [row for row in rows if row[0] == rows[0][0]]
    axes.plot([r[1] for r in first], [r[2] for r in first], label="closed form")
    axes.plot([r[1] for r in first], [r[3] for r in first], "x", label="Monitor")
    axes.set(xlabel="noise σ", ylabel="expected ⟨S, B⟩, first problem", yscale="symlog")
    axes.legend()
    save_figure(out / "regression.png", figure)
    table = [
        [f"{noise:g}", f"{max(row[4] for row in rows if row[1] == noise):.1e}"] for noise in NOISES
    ]
    return Section(
        "3. Linear regression in closed form",
        ["Expected ⟨S, B⟩ under weight noise against −‖x‖²[(vᵀx)² + σ²‖x‖² − vᵀx·y]: the largest "
         "relative difference over the problems. Noise makes it anti-Hebbian as σ²."],
        ["σ", "largest relative difference"],
        table,
        "regression.png",
    )  # fmt: skip
