"""Experiment 3: the phase diagram of noise and weight decay, its boundary and the exponent.

Training is in `phase.py`; here are the grid, the figure and what the report says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ghl.recipes.figures import save_figure
from ghl.recipes.reproduce.cells import Cell
from ghl.recipes.reproduce.phase import Boundary, fit
from ghl.recipes.reproduce.report import Section, write_csv

NOISES = (5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3)
DECAYS = tuple(float(f"{d:.3g}") for d in np.geomspace(5e-5, 5e-3, 10))
FLOOR_DECAYS = tuple(float(f"{d:.3g}") for d in np.geomspace(5e-6, 4e-4, 10))  # of σ = 0
RULE, LR, STEPS, SEEDS = "sgd", 0.5, 3000, 4


def cells(seeds: int, shorten: int = 1) -> list[Cell]:
    """One cell a noise level, with all decays and at most SEEDS seeds stacked."""
    seeds = min(seeds, SEEDS)
    arguments = {"rule": RULE, "lr": LR, "steps": STEPS // shorten, "seeds": list(range(seeds))}
    return [
        Cell(
            f"phase-{noise:g}",
            "ghl.recipes.reproduce.phase:cell",
            {**arguments, "decays": list(DECAYS if noise else FLOOR_DECAYS), "noise": noise},
            cost=seeds,
        )
        for noise in (0.0, *NOISES)
    ]


def summarize(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
    """Write phase.csv and phase.png; the section of the report."""
    stored = sorted(results.values(), key=lambda s: s["arguments"]["noise"])
    levels = [s["arguments"]["noise"] for s in stored]
    results_of = [s["result"] for s in stored]
    rows = [
        [noise, decay, seed, cosine, result["weight_norm"][i][seed], result["loss"][i][seed]]
        for noise, result in zip(levels, results_of, strict=True)
        for i, decay in enumerate(DECAYS if noise else FLOOR_DECAYS)
        for seed, cosine in enumerate(result["cosine"][i])
    ]
    noises = levels[1:]
    cosines = np.array([result["cosine"] for result in results_of[1:]])
    without = np.array([results_of[0]["cosine"]])
    head = ["noise", "decay", "seed", "cosine", "weight_norm", "loss"]
    write_csv(out / "phase.csv", head, rows)
    table = [
        [f"{noise:g}", *(f"{c:+.3f}" for c in line)]
        for noise, line in zip(noises, cosines.mean(2), strict=True)
    ]
    notes = [
        f"Chosen here: SGD with learning rate {LR:g}, {stored[0]['arguments']['steps']} steps of "
        f"64, {cosines.shape[2]} seeds; noise of standard deviation σ is added to every weight "
        "before each step; the alignment is that of the second layer, as in experiment 2.",
        "The boundary of a noise level is where the mean alignment turns from negative to "
        "positive, by interpolation in log γ; the interval is from resampling the seeds.",
    ]
    found = None
    try:
        found = fit(Boundary(noises, DECAYS, cosines), Boundary([0.0], FLOOR_DECAYS, without))
        text = exponents(found)
        if found["left_out"]:
            left = ", ".join(f"{s:g}" for s in found["left_out"])
            notes.append(f"Without a crossing on the grid, and left out: σ = {left}.")
    except ValueError as error:
        text = f"No exponent: {error}."
    save_figure(out / "phase.png", draw(noises, cosines.mean(2), found))
    return Section(
        "3. Noise against weight decay",
        [text, "Alignment by noise σ (rows) and weight decay γ (columns):"],
        ["σ \\ γ", *(f"{d:g}" for d in DECAYS)],
        table,
        "phase.png",
        notes,
    )


def exponents(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    above_low, above_high = found["interval_above"]
    return (
        f"Boundary γ ∝ σ^{found['exponent']:.2f}, 95 % interval {low:.2f} to {high:.2f} "
        "(published: γ ∝ σ²). Without any noise added, batches alone put the boundary at "
        f"γ₀ = {found['floor']:.1e}, which flattens the line where σ is small; beyond it, "
        f"γ − γ₀ ∝ σ^{found['exponent_above']:.2f}, interval {above_low:.2f} to {above_high:.2f}."
    )


def draw(noises: list[float], cosines: np.ndarray, found: dict[str, Any] | None) -> Figure:
    """The alignment as colour over σ and γ, with the boundary and its line."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    limit = float(np.nanmax(np.abs(cosines))) or 1.0
    mesh = axes.pcolormesh(
        noises, DECAYS, cosines.T, cmap="RdBu_r", vmin=-limit, vmax=limit, shading="nearest"
    )
    figure.colorbar(mesh, label="alignment, cosine")
    if found is not None:
        axes.plot(found["noise"], found["boundary"], "ko", label="boundary")
        line = [found["factor"] * s ** found["exponent"] for s in noises]
        axes.plot(noises, line, "k--", label=f"γ ∝ σ^{found['exponent']:.2f}")
        axes.legend()
    axes.set(xscale="log", yscale="log", xlabel="noise σ", ylabel="weight decay γ")
    return figure
