"""Why experiment 2's transformer under Adam may differ: what the batch of a measurement is made of.

One training as in the table; then the alignment of its last weights, without a step, of batches of
one length, of several lengths, and larger ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from ghl.alignment import Monitor
from ghl.recipes.reproduce.cells import Cell
from ghl.recipes.reproduce.report import Section, mean_std, save_figure, write_csv
from ghl.recipes.reproduce.transformer import LAYER, batches, draw_student, forever

LR, BATCH = 1e-3, 64
TRAININGS = ((5e-5, 2000), (5e-4, 2000), (5e-4, 6000))  # γ and steps; the table has 2000
Batch = tuple[Tensor, Tensor]
NAMES = {
    "one": "64 rows of one length",
    "mixed": "64 rows of 32 lengths",
    "512": "512 rows of 8 lengths",
    "6400": "6400 rows of 100 lengths",
}


def cell(
    decay: float, seed: int, steps: int, parts: int = 100, examples: int = 20_000
) -> dict[str, float]:
    """The mean cosine for each composition, from the first `parts` batches of the training set."""
    data = batches(1_000_000 + seed, examples, BATCH, draw_student(2_000_000 + seed))
    student = draw_student(seed)
    optimizer = torch.optim.Adam(student.parameters(), LR, weight_decay=decay)
    for tokens, target in forever(data, seed, steps):
        optimizer.zero_grad()
        F.mse_loss(student(tokens), target).backward()
        optimizer.step()
    return compositions(student, data[:parts])


def compositions(student: nn.Module, data: Sequence[Batch]) -> dict[str, float]:
    """By the keys of NAMES; every second of single batches, for their number."""
    mixed: list[list[Batch]] = [
        [(tokens[i : i + 2], target[i : i + 2]) for tokens, target in data[:32]]
        for i in range(0, BATCH, 10)
    ]
    eight = [list(data[start : start + 8]) for start in range(0, len(data) - 7, 8)]
    one = [[batch] for batch in data[::2]]
    groups = {"one": one, "mixed": mixed, "512": eight, "6400": [list(data)]}
    return {
        name: sum(cosine(student, group) for group in made) / len(made)
        for name, made in groups.items()
    }


def cosine(student: nn.Module, group: Sequence[Batch]) -> float:
    """Of the mean S and the mean B over all rows of a group of batches, at layer 2 of the MLP."""
    rows = sum(len(tokens) for tokens, _ in group)
    student.zero_grad()
    with Monitor(student, statistic="batch") as monitor:
        for tokens, target in group:
            (F.mse_loss(student(tokens), target) * (len(tokens) / rows)).backward()
        return float(monitor.report()[LAYER]["batch"]["cosine"])


def cells(seeds: int, shorten: int = 1) -> list[Cell]:
    """One cell a training and seed; a trial measures with fewer batches too."""
    trial = {"parts": 8, "examples": 8 * BATCH} if shorten > 1 else {}
    function = "ghl.recipes.reproduce.composition:cell"
    return [
        Cell(f"composition-{decay:g}-{steps}-{seed}", function,
             {"decay": decay, "seed": seed, "steps": steps // shorten, **trial}, cost=steps)
        for seed in range(seeds)
        for decay, steps in TRAININGS
    ]  # fmt: skip


def summarize(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
    """Write composition.csv and composition.png; the section of the report."""
    found: dict[tuple[float, int], dict[str, list[float]]] = {}
    for stored in results.values():
        training = stored["arguments"]["decay"], stored["arguments"]["steps"]
        by_name = found.setdefault(training, {name: [] for name in NAMES})
        for name, values in by_name.items():
            values.append(stored["result"][name])
    rows = [
        [*training, name, seed, value]
        for training, by_name in found.items()
        for name, values in by_name.items()
        for seed, value in enumerate(values)
    ]
    head = ["decay", "steps", "batch", "seed", "cosine"]
    write_csv(out / "composition.csv", head, rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    labels = [f"γ = {decay:g}, {steps} steps" for decay, steps in found]
    for label, by_name in zip(labels, found.values(), strict=True):
        means, stds = zip(*(mean_std(values) for values in by_name.values()), strict=True)
        axes.errorbar(range(len(NAMES)), means, stds, marker=".", label=label)
    axes.set_xticks(range(len(NAMES)), list(NAMES.values()), rotation=15)
    axes.set(ylabel="alignment, cosine")
    axes.legend()
    save_figure(out / "composition.png", figure)
    seeds = len(next(iter(found.values()))["one"])
    return Section(
        "2. What a batch is made of: transformer, Adam",
        ["Alignment of the weights that a training as in the table ends with, by what the batch of "
         "the measurement is made of. The table has the first row at 2000 steps, averaged over the "
         "last fifth of training; published: 0.50 at γ = 5e-5 and 0.99 at 5e-4."],
        ["", *labels],
        [[label, *("{:.2f} ± {:.2f}".format(*mean_std(f[name])) for f in found.values())]
         for name, label in NAMES.items()],
        "composition.png",
        [f"Training in batches of {BATCH} rows of one length, {seeds} seeds. What a mean over "
         "tokens has to learn differs with their number: a batch of one length may have a signal "
         "of its own, which the next ones take back, and which mixed lengths average out.",
         "So far as the rows and columns differ, the published figure depends on choices that the "
         "paper leaves open. A difference that no row or column makes up for is unexplained."],
    )  # fmt: skip
