"""Experiments 4, 7, 8, 9 and the lengths of 2: one setting of the MLP students varied.

Each is a list of values, a cell for each (or one for all, where they can be stacked), and a line of
alignment and held-out error against the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ghl.recipes.figures import save_figure
from ghl.recipes.reproduce import sre
from ghl.recipes.reproduce.cells import Cell
from ghl.recipes.reproduce.report import Section, mean_std, write_csv

SEEDS, DECAY, STEPS = 3, 5e-4, 4000
QUANTITIES = ("cosine", "loss", "validation_loss", "weight_norm")


@dataclass(frozen=True)
class Sweep:
    """What varies and over which values; `fixed` are settings of sre.Students."""

    title: str
    text: str
    setting: str
    values: tuple[float, ...]
    fixed: dict[str, Any]
    logarithmic: bool = True
    decay: float = DECAY

    @property
    def stacked(self) -> bool:
        """Whether all values train in one stack."""
        return self.setting in ("decay", "noise")


FEWEST = 35  # steps that sre.Students can measure
LENGTHS = (200, 500, 1000, 2000, 4000)
LONG = "How far the table's figure depends on the length of training, which the paper leaves open."
SGD = {"rule": "sgd", "lr": 0.1}
SWEEPS = {
    "length-sgd": Sweep(
        "2. Length of training: SGD at γ = 5e-3", LONG, "steps", LENGTHS, SGD, decay=5e-3,
    ),
    "length-dfa": Sweep(
        "2. Length of training: DFA at γ = 0", LONG, "steps", LENGTHS, {"rule": "dfa", "lr": 0.1},
        decay=0.0,
    ),
    "generalisation": Sweep(
        "4. Generalisation against alignment",
        "Weight decay varied with a training set of 500 examples: the held-out error beside the "
        "alignment.",
        "decay", (0.0, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3), {**SGD, "examples": 500},
        logarithmic=False,
    ),
    "batch": Sweep(
        "7. Batch size", f"SGD at γ = {DECAY:g}, the same number of steps at every batch size.",
        "batch", (8, 16, 32, 64, 128, 256, 512), SGD,
    ),
    "lr": Sweep(
        "8. Learning rate", f"SGD at γ = {DECAY:g}, the same number of steps at every rate.",
        "lr", (0.01, 0.03, 0.1, 0.3, 1.0), {"rule": "sgd"},
    ),
    "noise": Sweep(
        "9. Noise under Adam", f"Adam at γ = {DECAY:g}; noise is added to the weights before each "
        "step.", "noise", (0.0, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3), {"rule": "adam", "lr": 1e-3},
        logarithmic=False,
    ),
}  # fmt: skip


def cell(
    setting: str,
    values: Sequence[float],
    seeds: Sequence[int],
    fixed: dict[str, Any],
    steps: int,
    base_decay: float = DECAY,
) -> dict[str, Any]:
    """Every quantity as (values, seeds); several values only of a setting that can be stacked."""
    settings = {**fixed, "steps": steps}
    n = len(values) * len(seeds)
    decay, noise = torch.full((n,), base_decay), None
    varied = torch.tensor([v for v in values for _ in seeds])
    if setting == "decay":
        decay = varied
    elif setting == "noise":
        noise = varied
    else:
        (value,) = values
        settings[setting] = int(value) if setting in ("batch", "steps") else value
    found = sre.train(sre.Students(**settings), [s for _ in values for s in seeds], decay, noise)
    shape = (len(values), len(seeds))
    return {name: torch.tensor(found[name]).view(shape).tolist() for name in QUANTITIES}


def cells(name: str, seeds: int, shorten: int = 1) -> list[Cell]:
    """The cells of one sweep, with at most SEEDS seeds."""
    sweep = SWEEPS[name]
    seeds = min(seeds, SEEDS)
    common = {"seeds": list(range(seeds)), "fixed": sweep.fixed, "steps": STEPS // shorten}
    if sweep.decay != DECAY:
        common["base_decay"] = sweep.decay
    values = list(sweep.values)
    if sweep.setting == "steps":
        values = sorted({max(FEWEST, int(v) // shorten) for v in values})
    function = "ghl.recipes.reproduce.sweep:cell"
    groups = [values] if sweep.stacked else [[v] for v in values]
    return [
        Cell(
            f"{name}-{'all' if sweep.stacked else format(group[0], 'g')}",
            function,
            {"setting": sweep.setting, "values": group, **common},
            cost=len(group) * relative_cost(sweep.setting, group[0]),
        )
        for group in groups
    ]


def relative_cost(setting: str, value: float) -> float:
    return value / {"batch": 64, "steps": STEPS}.get(setting, value) if value else 1.0


def summarize(name: str) -> Callable[[Mapping[str, dict[str, Any]], Path], Section]:
    """From the results of one sweep to its CSV file, figure and section."""
    sweep = SWEEPS[name]

    def section(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
        points = sorted(
            (value, {q: stored["result"][q][i] for q in QUANTITIES})
            for stored in results.values()
            for i, value in enumerate(stored["arguments"]["values"])
        )
        rows = [
            [value, seed, *(quantities[q][seed] for q in QUANTITIES)]
            for value, quantities in points
            for seed in range(len(quantities["cosine"]))
        ]
        write_csv(out / f"{name}.csv", [sweep.setting, "seed", *QUANTITIES], rows)
        save_figure(out / f"{name}.png", draw(sweep, points))
        stored = next(iter(results.values()))["arguments"]
        settings = ", ".join(f"{k} {v}" for k, v in sweep.fixed.items())
        return Section(
            sweep.title,
            [sweep.text],
            [sweep.setting, "alignment", "training loss", "held-out loss", "‖W₂‖"],
            [
                [f"{value:g}", *(text(quantities[q]) for q in QUANTITIES)]
                for value, quantities in points
            ],
            f"{name}.png",
            [f"{settings}; {steps_text(sweep, stored)}, {len(stored['seeds'])} seeds; all else as "
             "in experiment 2. No published figures at hand."],
        )  # fmt: skip

    return section


def steps_text(sweep: Sweep, arguments: Mapping[str, Any]) -> str:
    if sweep.setting == "steps":
        return "the last fifth of that many steps"
    return f"{arguments['steps']} steps"


def text(values: Sequence[float]) -> str:
    mean, std = mean_std(values)
    return f"{mean:.3g} ± {std:.1g}"


def draw(sweep: Sweep, points: Sequence[tuple[float, Mapping[str, Sequence[float]]]]) -> Figure:
    """Alignment and held-out loss against the value that varies."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("cosine", "validation_loss"), strict=True):
        means, stds = zip(*(mean_std(found[quantity]) for _, found in points), strict=True)
        values = [value for value, _ in points]
        places: Sequence[float] = values if sweep.logarithmic else range(len(values))
        axes.errorbar(places, means, stds, marker=".")
        axes.set(
            xlabel=sweep.setting,
            ylabel={"cosine": "alignment, cosine"}.get(quantity, "held-out loss"),
        )
        if sweep.logarithmic:
            axes.set_xscale("log")
        else:
            axes.set_xticks(places, [f"{value:g}" for value in values], rotation=45)
        axes.grid(alpha=0.3)
    return figure
