"""Figures of training: the curves of one run, and of several runs side by side; how all are saved.

Curves are drawn from rows of `metrics.py`; nothing is computed here.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ghl.recipes.disk import told_if_full
from ghl.recipes.metrics import Row
from ghl_kernels.files import write_atomic

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b")


def draw_curves(path: Path, runs: Mapping[str, Sequence[Row]], title: str) -> None:
    """Loss and accuracy by epoch, training dashed and test solid, one colour per run.

    On a full disk there is no figure, which is told.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for index, (name, rows) in enumerate(runs.items()):
        color = COLORS[index % len(COLORS)]
        epochs = [row.epoch for row in rows]
        for axes, quantity in ((loss, "loss"), (accuracy, "acc")):
            for split, style in (("train", "--"), ("test", "-")):
                values = [getattr(row, f"{split}_{quantity}") for row in rows]
                axes.plot(epochs, values, style, marker=".", color=color, label=f"{name}, {split}")
    loss.set_ylabel("cross-entropy")
    loss.set_yscale("log")
    accuracy.set_ylabel("accuracy, %")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    accuracy.legend(fontsize="small")
    figure.suptitle(title)
    with told_if_full(f"{path.name} is not drawn"):
        save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, lambda file: file.write(buffer.getvalue()))
