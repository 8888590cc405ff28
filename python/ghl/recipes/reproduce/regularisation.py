"""Experiment 10: alignment under regularisers other than weight decay, each at four strengths.

What the regularisers compute is in `regularisers.py`; all else is as in experiment 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ghl.recipes.figures import save_figure
from ghl.recipes.reproduce import sre
from ghl.recipes.reproduce.cells import Cell
from ghl.recipes.reproduce.regularisers import REGULARISERS, Regularised
from ghl.recipes.reproduce.report import Section, mean_std, write_csv
from ghl.recipes.reproduce.students import Learner, Stack

SEEDS, STEPS, LR = 3, 4000, 0.1
QUANTITIES = ("cosine", "loss", "validation_loss", "weight_norm")
DECAYS = (0.0, 5e-4, 2e-3, 5e-3)
# Where the regulariser has a strength of its own; the others are normalisations beside DECAYS.
STRENGTHS = {
    "l1": (0.0, 1e-6, 1e-5, 1e-4),
    "activity": (0.0, 1e-5, 1e-4, 1e-3),
    "dropout": (0.0, 0.05, 0.2, 0.5),
    "spectral": (0.0, 1e-3, 1e-2, 1e-1),
}
NAMES = {
    "decay": "weight decay γ",
    "l1": "L1, λ‖W‖₁",
    "activity": "activity, λ‖h_a‖₁",
    "dropout": "dropout, p",
    "spectral": "spectral, λ/2 Σ σ²",
    "batch-norm": "batch norm, γ",
    "weight-norm": "weight norm, γ",
    "spectral-norm": "spectral norm, γ",
}


def cell(
    regulariser: str, strengths: Sequence[float], seeds: Sequence[int], steps: int
) -> dict[str, Any]:
    """Every quantity as (strengths, seeds), all trained in one stack."""
    strength = torch.tensor([s for s in strengths for _ in seeds])

    def make(stack: Stack, decay: Tensor) -> Learner:
        if regulariser == "decay":
            return Learner(stack, "sgd", LR, decay, 0)
        return Regularised(stack, regulariser, LR, decay, 0)

    settings = sre.Students(rule="sgd", lr=LR, steps=steps)
    found = sre.train(settings, [s for _ in strengths for s in seeds], strength, make=make)
    shape = (len(strengths), len(seeds))
    return {name: torch.tensor(found[name]).view(shape).tolist() for name in QUANTITIES}


def cells(seeds: int, shorten: int = 1) -> list[Cell]:
    """One cell a regulariser, with at most SEEDS seeds."""
    common = {"seeds": list(range(min(seeds, SEEDS))), "steps": STEPS // shorten}
    return [
        Cell(
            f"regularisers-{kind}",
            "ghl.recipes.reproduce.regularisation:cell",
            {"regulariser": kind, "strengths": list(STRENGTHS.get(kind, DECAYS)), **common},
        )
        for kind in ("decay", *REGULARISERS)
    ]


def summarize(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
    """Write regularisers.csv and regularisers.png; the section of the report."""
    points = [
        (
            stored["arguments"]["regulariser"],
            strength,
            {q: stored["result"][q][i] for q in QUANTITIES},
        )
        for stored in results.values()
        for i, strength in enumerate(stored["arguments"]["strengths"])
    ]
    rows = [
        [kind, strength, seed, *(found[q][seed] for q in QUANTITIES)]
        for kind, strength, found in points
        for seed in range(len(found["cosine"]))
    ]
    write_csv(out / "regularisers.csv", ["regulariser", "strength", "seed", *QUANTITIES], rows)
    save_figure(out / "regularisers.png", draw(points))
    arguments = next(iter(results.values()))["arguments"]
    kinds = list(dict.fromkeys(kind for kind, *_ in points))
    return Section(
        "10. Other regularisers",
        ["Alignment at layer 2 of the signal of the loss alone, ± over seeds, and after it the "
         "held-out error; the strength stands before the colon."],
        ["", "none", "weak", "medium", "strong"],
        [[NAMES[kind], *(text(s, f) for k, s, f in points if k == kind)] for kind in kinds],
        "regularisers.png",
        notes(arguments),
    )  # fmt: skip


def text(strength: float, found: Mapping[str, Sequence[float]]) -> str:
    mean, std = mean_std(found["cosine"])
    return f"{strength:g}: {mean:.2f} ± {std:.2f}, {mean_std(found['validation_loss'])[0]:.1e}"


def notes(arguments: Mapping[str, Any]) -> list[str]:
    return [
        f"SGD {LR:g}, {arguments['steps']} steps of 64, {len(arguments['seeds'])} seeds; all else "
        "as in experiment 2. Strengths chosen here. No published figures at hand.",
        "To be expected: what holds weights or activations down is balanced by the signal, which "
        "turns Hebbian, as under weight decay; dropout is noise, which turns it anti-Hebbian; "
        "behind a batch or spectral norm the length of a weight has no effect on the loss, so no "
        "signal balances its decay.",
        "W is the weight that the forward uses, S = −∂ℓ/∂W without the penalty. Penalties act on "
        "all weights, or on both hidden layers' activations, at γ = 0. Normalisations have no "
        "strength: beside them acts weight decay on all parameters. Batch normalisation is that of "
        "nn.BatchNorm1d between a hidden layer and its tanh, without scale and shift, on held-out "
        "data with their own statistics; weight and spectral normalisation are of all layers.",
    ]


def draw(points: Sequence[tuple[str, float, Mapping[str, Sequence[float]]]]) -> Figure:
    """Alignment and held-out error by strength, a line a regulariser."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for kind in dict.fromkeys(kind for kind, *_ in points):
        mine = [found for k, _, found in points if k == kind]
        for axes, quantity in zip(panels, ("cosine", "validation_loss"), strict=True):
            means, stds = zip(*(mean_std(found[quantity]) for found in mine), strict=True)
            axes.errorbar(range(len(mine)), means, stds, marker=".", label=NAMES[kind])
    for axes, label in zip(panels, ("alignment, cosine", "held-out loss"), strict=True):
        axes.set_xticks(range(len(DECAYS)), ["none", "weak", "medium", "strong"])
        axes.set(xlabel="strength", ylabel=label)
        axes.grid(alpha=0.3)
    panels[1].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
