"""`ghl align DIR`: figures and a table of the alignment that a run has recorded.

Reads the files of `ghl.alignment.sinks.Csv`; nothing is measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ghl.alignment.sinks import LAYERS_CSV, NEURONS_CSV, read_csv, table_of_rows
from ghl.alignment.statistics import PARTS
from ghl.recipes.errors import inside
from ghl.recipes.figures import save_figure

Rows = Sequence[Mapping[str, str]]
PANELS = (
    ("batch_cosine", "batch: cos(S̄, B̄)"),
    ("sample_cosine", "sample: mean cos(S, B)"),
    ("update_cosine", "whole update: cos(ΔW, B̄)"),
    ("weight_norm", "‖W‖"),
    ("hebbian_share", "share of Hebbian neurons"),
    ("sign_flips", "sign flips of G, step to step"),
)


def align(args: argparse.Namespace) -> int:
    """Run `ghl align`: draw alignment.png, and neurons.png where neurons were recorded."""
    path = args.dir / LAYERS_CSV
    if not path.is_file():
        raise FileNotFoundError(
            f"{args.dir}: expected {LAYERS_CSV} in it, which `ghl train --align-every N` writes "
            f"(or ghl.alignment.sinks.Csv){inside(args.dir, LAYERS_CSV)}"
        )
    rows = read_csv(path)
    if not rows:
        raise ValueError(f"{path}: expected rows, found none: no step was measured")
    last = rows[-1]["step"]
    print(table_of_rows([row for row in rows if row["step"] == last]))
    written = [args.dir / "alignment.png"]
    save_figure(written[0], draw_layers(rows))
    neurons = args.dir / NEURONS_CSV
    if neurons.is_file() and (found := read_csv(neurons)):
        written.append(args.dir / "neurons.png")
        save_figure(written[1], draw_neurons(found))
    print("drawn: " + ", ".join(str(p) for p in written))
    return 0


def draw_layers(rows: Rows) -> Figure:
    """Every quantity over the steps, a line for each layer; gaps are gaps in the line."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, 3).flat
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    for axes, (column, title) in zip(panels, PANELS, strict=True):
        for layer in layers:
            mine = [row for row in rows if row["layer"] == layer]
            values = [float(row[column]) if row[column] else np.nan for row in mine]
            axes.plot([int(row["step"]) for row in mine], values, marker=".", label=layer)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if column.endswith("cosine"):
            axes.axhline(0, color="grey", lw=0.7)
    figure.legend(*panels_of(figure), loc="outside right upper", fontsize="small")
    return figure


def panels_of(figure: Figure) -> tuple[list, list]:
    """Handles and labels of the first panel, which all panels share."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    return list(handles), list(labels)


def draw_neurons(rows: Rows) -> Figure:
    """The cosine of each neuron over the steps as colour, a panel for each layer.

    Of the first of batch, sample, update that was recorded; neurons in the order of their mean.
    """
    part = next(p for p in PARTS if any(r["part"] == p for r in rows))
    rows = [row for row in rows if row["part"] == part]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure = Figure(figsize=(8, 2 + 1.8 * len(layers)), layout="constrained")
    for axes, layer in zip(
        figure.subplots(len(layers), 1, squeeze=False)[:, 0], layers, strict=True
    ):
        mine = [row for row in rows if row["layer"] == layer]
        steps = sorted({int(row["step"]) for row in mine})
        neurons = 1 + max(int(row["neuron"]) for row in mine)
        grid = np.full((neurons, len(steps)), np.nan)
        for row in mine:
            grid[int(row["neuron"]), steps.index(int(row["step"]))] = float(row["cosine"])
        filled = np.where(np.isnan(grid), 0, grid).mean(1)
        image = axes.imshow(
            grid[np.argsort(-filled)], aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1,
            interpolation="nearest", extent=(steps[0], steps[-1] + 1, neurons, 0),
        )  # fmt: skip
        axes.set(ylabel=layer)
    axes.set(xlabel="step")
    figure.colorbar(image, ax=figure.axes, label=f"cosine of each neuron ({part})")
    return figure
