"""Experiments 5 and 6: alignment step by step, of a layer from its first step, and of its neurons.

Students as in the table, under SGD; recorded are series in time instead of their means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ghl.recipes.figures import save_figure
from ghl.recipes.reproduce.cells import Cell
from ghl.recipes.reproduce.report import Section, mean_std, write_csv
from ghl.recipes.reproduce.sre import WIDTHS, teach
from ghl.recipes.reproduce.students import Learner, Stack, alignment, neurons, squared_error

SEEDS, DECAY, BATCH, LAYER = 3, 5e-4, 64, 1
EARLY_STEPS, NEURON_STEPS = 3000, 3000
# activation, factor on the initial weights, learning rate
EARLY = {
    "relu": ("relu", 1.0, 0.1),
    "relu, half the scale": ("relu", 0.5, 0.1),
    "relu, twice the scale": ("relu", 2.0, 0.1),
    "relu, lr 0.3": ("relu", 1.0, 0.3),
    "tanh": ("tanh", 1.0, 0.1),
}


def series(
    activation: str, scale: float, lr: float, steps: int, seeds: int, skip: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alignment at layer 2 after `skip` steps, each of its own batch: (steps, n), (steps, n, K)."""
    x, y = teach(range(seeds), 20_000)
    stack = Stack(WIDTHS, range(seeds), activation)
    with torch.no_grad():
        for w in stack.weights:
            w *= scale
    learner = Learner(stack, "sgd", lr, torch.full((seeds,), DECAY), 0)
    order = torch.Generator().manual_seed(0)
    layers_found, neurons_found = [], []
    for step in range(skip + steps):
        rows = torch.randint(x.shape[1], (BATCH,), generator=order)
        _, layers = learner.gradients(x[:, rows], squared_error(y[:, rows]))
        if step >= skip:
            layers_found.append(alignment(stack, layers, LAYER))
            neurons_found.append(neurons(stack, layers, LAYER))
        learner.step()
    return torch.stack(layers_found), torch.stack(neurons_found)


def early_cell(activation: str, scale: float, lr: float, steps: int, seeds: int) -> dict[str, Any]:
    """The layer's alignment at every step from the first, averaged over 10 steps: (time, seeds)."""
    found, _ = series(activation, scale, lr, steps, seeds)
    return {"cosine": found.view(steps // 10, 10, seeds).mean(1).tolist()}


def neuron_cell(steps: int, seeds: int) -> dict[str, Any]:
    """Of every neuron (seeds × K), over the last half: mean cosine, share of steps in which it is
    Hebbian, autocorrelation time in steps."""
    _, found = series("tanh", 1.0, 0.1, steps // 2, seeds, skip=steps - steps // 2)
    every = found.flatten(1).T.double().numpy()
    return {
        "mean": every.mean(1).tolist(),
        "hebbian": (every > 0).mean(1).tolist(),
        "time": [autocorrelation_time(one) for one in every],
    }


def autocorrelation_time(values: np.ndarray) -> float:
    """τ = 1 + 2 Σ ρ(lag), summed up to the first lag of at least 3 τ (Sokal 1997): 1 for white
    noise, NaN for values that do not vary."""
    centred = values - values.mean()
    variance = float(centred @ centred)
    if variance == 0 or not np.isfinite(variance):
        return float("nan")
    size = 2 * len(values)
    spectrum = np.abs(np.fft.rfft(centred, size)) ** 2
    correlation = np.fft.irfft(spectrum, size)[: len(values)] / variance
    times = 2 * np.cumsum(correlation) - 1
    enough = np.flatnonzero(np.arange(len(times)) >= 3 * times)
    return float(times[enough[0] if len(enough) else -1])


def early_cells(seeds: int, shorten: int = 1) -> list[Cell]:
    """One cell a variant, with at most SEEDS seeds."""
    function = "ghl.recipes.reproduce.dynamics:early_cell"
    steps = max(10, EARLY_STEPS // shorten // 10 * 10)
    return [
        Cell(
            f"early-{index}",
            function,
            {
                "activation": activation, "scale": scale, "lr": lr, "steps": steps,
                "seeds": min(seeds, SEEDS),
            },
        )
        for index, (activation, scale, lr) in enumerate(EARLY.values())
    ]  # fmt: skip


def neuron_cells(seeds: int, shorten: int = 1) -> list[Cell]:
    """One cell with all seeds, at most SEEDS."""
    arguments = {"steps": NEURON_STEPS // shorten, "seeds": min(seeds, SEEDS)}
    return [Cell("neurons", "ghl.recipes.reproduce.dynamics:neuron_cell", arguments)]


def summarize_early(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
    """Write early.csv and early.png; the section of the report."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    rows, table = [], []
    names = list(EARLY)
    for cell, stored in sorted(results.items()):
        name = names[int(cell.rpartition("-")[2])]
        found = np.array(stored["result"]["cosine"])
        steps = np.arange(len(found)) * 10 + 5
        axes.plot(steps, found.mean(1), label=name)
        rows += [
            [name, step, seed, value]
            for step, line in zip(steps.tolist(), found.tolist(), strict=True)
            for seed, value in enumerate(line)
        ]
        head = found[: max(1, len(found) // 5)]
        peak = int(head.mean(1).argmax())
        values = (found[0], head[peak], found[-max(1, len(found) // 5) :].mean(0))
        table.append([name, *(pm(v.tolist()) for v in values), str(steps[peak])])
    axes.set(xscale="log", xlabel="step", ylabel="alignment of layer 2, cosine")
    axes.axhline(0, color="grey", lw=0.7)
    axes.legend()
    write_csv(out / "early.csv", ["variant", "step", "seed", "cosine"], rows)
    save_figure(out / "early.png", figure)
    return Section(
        "5. The first steps",
        ["Alignment from the first step on: at the start, at its highest in the first fifth of "
         "training, and over the last fifth."],
        ["", "first 10 steps", "highest of the first fifth", "last fifth", "step of the highest"],
        table,
        "early.png",
        [f"SGD, γ = {DECAY:g}, batches of {BATCH}; means over 10 steps, ± over seeds. No published "
         "figures at hand."],
    )  # fmt: skip


def summarize_neurons(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
    """Write neurons.csv and neurons.png; the section of the report."""
    (stored,) = results.values()
    mean, hebbian, time = (np.array(stored["result"][k]) for k in ("mean", "hebbian", "time"))
    columns = ["neuron", "mean_cosine", "share_of_steps_hebbian", "autocorrelation_time"]
    write_csv(
        out / "neurons.csv",
        columns,
        list(zip(range(len(mean)), *(v.tolist() for v in (mean, hebbian, time)), strict=True)),
    )
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    labels = ("mean cosine of a neuron", "share of steps it is Hebbian", "autocorrelation time")
    for axes, values, label in zip(
        figure.subplots(1, 3), (mean, hebbian, time[np.isfinite(time)]), labels, strict=True
    ):
        axes.hist(values, bins=30)
        axes.set(xlabel=label, ylabel="neurons")
    save_figure(out / "neurons.png", figure)
    constant = float(((hebbian > 0.9) | (hebbian < 0.1)).mean())
    low, median, high = np.nanpercentile(time, [5, 50, 95])
    return Section(
        "6. Neurons one by one",
        [f"Of {len(mean)} neurons, {(mean > 0).mean():.0%} are Hebbian on average and "
         f"{(mean < 0).mean():.0%} anti-Hebbian; {constant:.0%} keep one sign in nine steps of "
         "ten, the others change between both."],
        ["", "5 %", "median", "95 %"],
        [["autocorrelation time of a neuron's cosine, steps",
          *(f"{v:.1f}" for v in (low, median, high))],
         ["share of steps in which a neuron is Hebbian",
          *(f"{v:.2f}" for v in np.percentile(hebbian, [5, 50, 95]))]],
        "neurons.png",
        [f"Tanh, SGD 0.1, γ = {DECAY:g}, batches of {BATCH}, the last half of "
         f"{stored['arguments']['steps']} steps, {stored['arguments']['seeds']} seeds; the cosine "
         "is of each step's batch. No published figures at hand."],
    )  # fmt: skip


def pm(values: Sequence[float]) -> str:
    mean, std = mean_std(values)
    return f"{mean:+.3f} ± {std:.3f}"
