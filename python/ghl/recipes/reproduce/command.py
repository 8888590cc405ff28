"""`ghl reproduce`: which experiments there are, and one run over their cells.

What an experiment does is in its own module; cells and reports are not told apart here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghl.recipes.errors import check_integer
from ghl.recipes.reproduce import (
    dynamics,
    phase_diagram,
    regression,
    regularisation,
    rules,
    sce,
    sweep,
    table,
    transformer_noise,
)
from ghl.recipes.reproduce.cells import Cell, run
from ghl.recipes.reproduce.report import Section, write

MOST_SHORTENED = 100  # with which every experiment still has steps to measure


@dataclass(frozen=True)
class Settings:
    """The options of the command that experiments look at."""

    seeds: int
    transformer_seeds: int
    root: str | None
    shorten: int


@dataclass(frozen=True)
class Experiment:
    """Its cells, and the summary of their results, which writes a CSV file and a figure."""

    cells: Callable[[Settings], list[Cell]]
    summarize: Callable[[Mapping[str, dict[str, Any]], Path], Section]
    needs_root: bool = False


def table_cells(network: str) -> Callable[[Settings], list[Cell]]:
    def cells(settings: Settings) -> list[Cell]:
        seeds = {"mlp": settings.seeds, "transformer": settings.transformer_seeds}
        return table.cells([network], seeds, settings.shorten)

    return cells


def sweep_experiment(name: str) -> Experiment:
    return Experiment(lambda s: sweep.cells(name, s.seeds, s.shorten), sweep.summarize(name))


EXPERIMENTS = {
    "sce": Experiment(lambda s: sce.cells(s.seeds, s.root, s.shorten), sce.summarize, True),
    "table": Experiment(table_cells("mlp"), table.summarize),
    "length-sgd": sweep_experiment("length-sgd"),
    "length-dfa": sweep_experiment("length-dfa"),
    "transformer": Experiment(table_cells("transformer"), table.summarize_transformer),
    "transformer-noise": Experiment(
        lambda s: transformer_noise.cells(s.transformer_seeds, s.shorten),
        transformer_noise.summarize,
    ),
    "phase": Experiment(lambda s: phase_diagram.cells(s.seeds, s.shorten), phase_diagram.summarize),
    "regression": Experiment(regression.cells, regression.summarize),
    "generalisation": sweep_experiment("generalisation"),
    "early": Experiment(
        lambda s: dynamics.early_cells(s.seeds, s.shorten), dynamics.summarize_early
    ),
    "neurons": Experiment(
        lambda s: dynamics.neuron_cells(s.seeds, s.shorten), dynamics.summarize_neurons
    ),
    "batch": sweep_experiment("batch"),
    "lr": sweep_experiment("lr"),
    "noise": sweep_experiment("noise"),
    "regularisers": Experiment(
        lambda s: regularisation.cells(s.seeds, s.shorten), regularisation.summarize
    ),
    "rules": Experiment(lambda s: rules.cells(s.seeds, s.shorten), rules.summarize),
}


def reproduce(args: argparse.Namespace) -> int:
    """Run `ghl reproduce`: compute what is not there yet, then write CSV, figures, report."""
    chosen = list(dict.fromkeys(args.experiments)) or by_default(args.root)
    for name in chosen:
        if name not in EXPERIMENTS:
            known = ", ".join(EXPERIMENTS)
            raise ValueError(f"EXPERIMENT is {name!r}, must be one of {known}")
    for field in ("seeds", "transformer_seeds", "processes"):
        check_integer(field, getattr(args, field), 1)
    check_integer("shorten", args.shorten, 1, MOST_SHORTENED + 1)
    settings = Settings(args.seeds, args.transformer_seeds, args.root, args.shorten)
    planned = {name: EXPERIMENTS[name].cells(settings) for name in chosen}
    sections = []
    for name, cells in planned.items():
        results = run(cells, args.out, args.processes, name)
        section = EXPERIMENTS[name].summarize(results, args.out)
        section.notes.append(cost(results))
        if args.shorten > 1:
            section.notes.append(f"A trial: every training is shortened by {args.shorten}.")
        sections.append(section)
        write(args.out, sections)
        print(f"{name}: {section.title}")
        for line in (section.head, *section.rows):
            print("  " + " | ".join(line))
    print(f"report in {args.out / 'report.md'} and report.html")
    return 0


def by_default(root: str | None) -> list[str]:
    """Every experiment that can be run without images, or with those in `root`."""
    left_out = [name for name, of in EXPERIMENTS.items() if of.needs_root and root is None]
    if left_out:
        print(f"left out, for want of --root: {', '.join(left_out)}")
    return [name for name in EXPERIMENTS if name not in left_out]


def cost(results: Mapping[str, dict[str, Any]]) -> str:
    cpu = sum(stored["cpu_seconds"] for stored in results.values())
    wall = sum(stored["wall_seconds"] for stored in results.values())
    return f"{len(results)} cells, {cpu:.0f} s of CPU time, {wall:.0f} s when run one by one."
