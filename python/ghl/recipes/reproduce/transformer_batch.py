"""Experiment 2's transformer under Adam in larger batches: how far its figures are those of noise.

Trained as in the table, in batches of another size and for another number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ghl.recipes.reproduce.cells import Cell
from ghl.recipes.reproduce.report import Section, mean_std, save_figure, write_csv
from ghl.recipes.reproduce.table import DECAYS, LR, PUBLISHED, WHOLE_EVERY

# γ, rows of a batch, steps; the first of each γ is the table's
TRAININGS = (
    (5e-5, 64, 2000), (5e-5, 512, 2000), (5e-5, 512, 4000),
    (5e-4, 64, 2000), (5e-4, 512, 2000),
)  # fmt: skip
STATISTICS = ("cosine", "whole")


def cells(seeds: int, shorten: int = 1) -> list[Cell]:
    """One cell a training and seed; a trial draws fewer examples too."""
    trial = {"examples": 1024, "validation": 64} if shorten > 1 else {}
    common = {"rule": "adam", "lr": LR["transformer"]["adam"], "whole_every": WHOLE_EVERY, **trial}
    return [
        Cell(
            f"transformer-batch-{decay:g}-{batch}-{steps}-{seed}",
            "ghl.recipes.reproduce.transformer:cell",
            {"decay": decay, "seed": seed, "steps": steps // shorten, "batch": batch, **common},
            cost=steps * batch,
        )
        for seed in range(seeds)
        for decay, batch, steps in TRAININGS
    ]


def summarize(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
    """Write transformer-batch.csv and transformer-batch.png; the section of the report."""
    found: dict[tuple[float, int, int], list[tuple[float, float]]] = {}
    for stored in results.values():
        training = tuple(stored["arguments"][name] for name in ("decay", "batch", "steps"))
        pair = tuple(stored["result"][name] for name in STATISTICS)
        found.setdefault(training, []).append(pair)
    rows = [
        [*training, seed, *pair]
        for training, pairs in found.items()
        for seed, pair in enumerate(pairs)
    ]
    write_csv(out / "transformer-batch.csv", ["decay", "batch", "steps", "seed", *STATISTICS], rows)
    save_figure(out / "transformer-batch.png", draw(found))
    return Section(
        "2. Batch size: transformer under Adam",
        ["The table's training in larger batches, whose noise is less: alignment of a step's own "
         "batch and of the 2,000 held-out examples in one."],
        ["γ", "batch", "steps", "of its own batch", "of 2,000", "published"],
        [
            [f"{decay:g}", f"{batch}", f"{steps}",
             *("{:.2f} ± {:.2f}".format(*mean_std(v)) for v in zip(*pairs, strict=True)),
             f"{published(decay)}"]
            for (decay, batch, steps), pairs in found.items()
        ],
        "transformer-batch.png",
        [f"Learning rate {LR['transformer']['adam']:g}, {len(next(iter(found.values())))} seeds; "
         "all else as in experiment 2. What neither column nor more rows and steps make up for is "
         "unexplained."],
    )  # fmt: skip


def published(decay: float) -> float:
    value = PUBLISHED["transformer", "adam"][DECAYS.index(decay)]
    assert value is not None
    return value


def draw(found: Mapping[tuple[float, int, int], list[tuple[float, float]]]) -> Figure:
    """Both statistics of every training; a cross is the published figure."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(STATISTICS):
        means, stds = zip(
            *(mean_std([pair[index] for pair in pairs]) for pairs in found.values()), strict=True
        )
        label = {"cosine": "of its own batch", "whole": "of 2,000 examples"}[name]
        axes.errorbar(range(len(found)), means, stds, fmt="o", capsize=3, label=label)
    axes.plot(range(len(found)), [published(d) for d, _, _ in found], "kx", label="published")
    names = [f"γ = {decay:g}\n{batch} × {steps}" for decay, batch, steps in found]
    axes.set_xticks(range(len(found)), names)
    axes.set(ylabel="alignment, cosine", xlabel="batch × steps")
    axes.legend()
    return figure
