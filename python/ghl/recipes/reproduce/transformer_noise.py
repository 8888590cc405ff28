"""Experiment 2's transformer under Adam with less noise: how far its figures are those of noise.

Trained as in the table, in batches of another size, for longer, or at last in smaller steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ghl.recipes.figures import save_figure
from ghl.recipes.reproduce.cells import Cell
from ghl.recipes.reproduce.report import Section, mean_std, write_csv
from ghl.recipes.reproduce.table import DECAYS, LR, PUBLISHED, WHOLE_EVERY

# γ, rows of a batch, steps, and how many of them go at a tenth of the learning rate: those that are
# measured, or none; the first of each γ is the table's
TRAININGS = (
    (5e-5, 64, 2000, 0), (5e-5, 512, 2000, 0), (5e-5, 512, 4000, 0), (5e-5, 64, 2500, 500),
    (5e-4, 64, 2000, 0), (5e-4, 512, 2000, 0), (5e-4, 64, 2500, 500),
)  # fmt: skip
Training = tuple[float, int, int, int]
STATISTICS = ("cosine", "whole")
HEAD = ["decay", "batch", "steps", "settling", "seed", *STATISTICS]


def cells(seeds: int, shorten: int = 1) -> list[Cell]:
    """One cell a training and seed; a trial draws fewer examples too."""
    trial = {"examples": 1024, "validation": 64} if shorten > 1 else {}
    common = {"rule": "adam", "lr": LR["transformer"]["adam"], "whole_every": WHOLE_EVERY, **trial}
    return [
        Cell(
            f"transformer-noise-{decay:g}-{batch}-{steps}-{settling}-{seed}",
            "ghl.recipes.reproduce.transformer:cell",
            {"decay": decay, "seed": seed, "steps": steps // shorten, "batch": batch, **common}
            | ({"settling": settling // shorten} if settling else {}),
            cost=steps * batch,
        )
        for seed in range(seeds)
        for decay, batch, steps, settling in TRAININGS
    ]


def summarize(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
    """Write transformer-noise.csv and transformer-noise.png; the section of the report."""
    found: dict[Training, list[tuple[float, float]]] = {}
    for stored in results.values():
        of = stored["arguments"]
        training = of["decay"], of["batch"], of["steps"], of.get("settling", 0)
        cosine, whole = (stored["result"][name] for name in STATISTICS)
        found.setdefault(training, []).append((cosine, whole))
    found = dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][3], item[0])))
    rows = [
        [*training, seed, *pair]
        for training, pairs in found.items()
        for seed, pair in enumerate(pairs)
    ]
    write_csv(out / "transformer-noise.csv", HEAD, rows)
    save_figure(out / "transformer-noise.png", draw(found))
    return Section(
        "2. Less noise: transformer under Adam",
        ["The table's training in larger batches, for longer, or with its last steps, the measured "
         "ones, at a tenth of the learning rate: alignment of a step's own batch and of the 2,000 "
         "held-out examples in one."],
        ["γ", "batch", "steps", "at a tenth", "of its own batch", "of 2,000", "published"],
        [
            [f"{decay:g}", f"{batch}", f"{steps}", f"{settling}",
             *("{:.2f} ± {:.2f}".format(*mean_std(v)) for v in zip(*pairs, strict=True)),
             f"{published(decay)}"]
            for (decay, batch, steps, settling), pairs in found.items()
        ],
        "transformer-noise.png",
        [f"Learning rate {LR['transformer']['adam']:g}, {len(next(iter(found.values())))} seeds; "
         "all else as in experiment 2.",
         "Of 2,000 examples, within two standard deviations of the published "
         "figure: "
         + ("; ".join(name(t, " ") for t, pairs in found.items() if is_near(t, pairs)) or "none")
         + "."],
    )  # fmt: skip


def name(training: Training, between: str) -> str:
    """A training in a figure or a sentence."""
    decay, batch, steps, settling = training
    parts = [f"γ = {decay:g},", f"{batch} × {steps}"]
    return between.join(parts + ["settling"] * bool(settling))


def is_near(training: Training, pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether the statistic of 2,000 examples is that close to the published figure."""
    mean, std = mean_std([whole for _, whole in pairs])
    return abs(mean - published(training[0])) <= 2 * std


def published(decay: float) -> float:
    value = PUBLISHED["transformer", "adam"][DECAYS.index(decay)]
    assert value is not None
    return value


def draw(found: Mapping[Training, list[tuple[float, float]]]) -> Figure:
    """Both statistics of every training; a cross is the published figure."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, statistic in enumerate(STATISTICS):
        means, stds = zip(
            *(mean_std([pair[index] for pair in pairs]) for pairs in found.values()), strict=True
        )
        label = {"cosine": "of its own batch", "whole": "of 2,000 examples"}[statistic]
        axes.errorbar(range(len(found)), means, stds, fmt="o", capsize=3, label=label)
    axes.plot(range(len(found)), [published(d) for d, *_ in found], "kx", label="published")
    axes.set_xticks(range(len(found)), [name(t, "\n") for t in found], fontsize=8)
    axes.set(ylabel="alignment, cosine", xlabel="batch × steps")
    axes.legend()
    return figure
