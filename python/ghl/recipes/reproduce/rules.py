"""Experiment 11: what alignment networks show that learn by GHL, by its sign, by Oja's rule.

Single students of SRE with their hidden layers swapped; the Monitor takes what the rule adds to a
weight as its signal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import ghl
from ghl.alignment import Monitor
from ghl.recipes.figures import save_figure
from ghl.recipes.reproduce import sre
from ghl.recipes.reproduce.cells import Cell
from ghl.recipes.reproduce.report import Section, mean_std, write_csv
from ghl.recipes.reproduce.students import Stack

RULES = {
    "bp": ghl.Rule.preset("bp"),
    "ghl": ghl.Rule.preset("ghl"),
    "sign": ghl.Rule.preset("sign"),
    "hebb": ghl.Rule.preset("hebb"),
    "oja": ghl.Rule(competition="linear", decay="oja", gate="hebb"),
}
DECAYS = (0.0, 5e-3)
SEEDS, STEPS, BATCH, LR = 3, 3000, 64, 0.1
LR_HEBB = {"bp": LR, "ghl": 1e-3, "sign": 1e-4, "hebb": 1e-3, "oja": 1e-3}
LAYER = "2"


def cell(rule: str, decay: float, seed: int, steps: int) -> dict[str, Any]:
    """Train one student; the cosines of layer 2 are means over every 7th step of the last fifth."""
    x, y = (t[0] for t in sre.teach([seed], 22_000))
    model = student(seed)
    ghl.swap(model, RULES[rule], types=nn.Linear, exclude=("4",))
    groups = ghl.param_groups(model, lr=LR, lr_hebb=LR_HEBB[rule], wd=decay, wd_hebb=decay)
    optimizer = torch.optim.SGD(groups, lr=LR)
    generator = torch.Generator().manual_seed(seed)
    monitor: Monitor | None = None
    signals, updates = [], []
    for step in range(steps):
        if monitor is None and step >= 0.8 * steps:
            monitor = Monitor(model, every=7, statistic="batch")
        rows = torch.randint(20_000, (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(x[rows]), y[rows]).backward()
        measuring = monitor is not None and monitor.measuring
        optimizer.step()
        if monitor is not None and measuring:
            found = monitor.report()[LAYER]
            signals.append(found["batch"]["cosine"])
            updates.append(found["update"]["cosine"])
    with torch.no_grad():
        error = float(F.mse_loss(model(x[20_000:]), y[20_000:]))
    return {
        "cosine": sum(signals) / len(signals),
        "update_cosine": sum(updates) / len(updates),
        "validation_loss": error,
        "validation_variance": float(y[20_000:].var()),
    }


def student(seed: int) -> nn.Sequential:
    """The student of experiment 2 with that seed, as modules."""
    stack = Stack(sre.WIDTHS, [seed], "tanh")
    layers: list[nn.Module] = []
    for w, b in zip(stack.weights, stack.biases, strict=True):
        layer = nn.Linear(w.shape[2], w.shape[1])
        with torch.no_grad():
            layer.weight.copy_(w[0])
            layer.bias.copy_(b[0, 0])
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cells(seeds: int, shorten: int = 1) -> list[Cell]:
    """One cell a rule, decay and seed, with at most SEEDS seeds."""
    function = "ghl.recipes.reproduce.rules:cell"
    return [
        Cell(
            f"rules-{rule}-{decay:g}-{seed}",
            function,
            {"rule": rule, "decay": decay, "seed": seed, "steps": STEPS // shorten},
        )
        for rule in RULES
        for decay in DECAYS
        for seed in range(min(seeds, SEEDS))
    ]


def summarize(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
    """Write rules.csv and rules.png; the section of the report."""
    quantities = ("cosine", "update_cosine", "validation_loss")
    rows = [
        [*(stored["arguments"][k] for k in ("rule", "decay", "seed"))]
        + [stored["result"][q] for q in quantities]
        for stored in results.values()
    ]
    write_csv(out / "rules.csv", ["rule", "decay", "seed", *quantities], rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    table = []
    for rule in dict.fromkeys(row[0] for row in rows):
        line, means, stds = [rule], [], []
        for decay in DECAYS:
            mine = [row for row in rows if row[:2] == [rule, decay]]
            (mean, std), update, error = (
                mean_std([r[3] for r in mine]),
                mean_std([r[4] for r in mine])[0],
                mean_std([r[5] for r in mine])[0],
            )
            line.append(f"{mean:.2f} ± {std:.2f}, {update:.2f}, {error:.1e}")
            means.append(mean)
            stds.append(std)
        table.append(line)
        axes.errorbar(range(len(DECAYS)), means, stds, marker=".", label=rule)
    axes.set_xticks(range(len(DECAYS)), [f"{d:g}" for d in DECAYS])
    axes.set(xlabel="weight decay γ", ylabel="alignment of what the rule adds, cosine")
    axes.axhline(0, color="grey", lw=0.7)
    axes.legend()
    save_figure(out / "rules.png", figure)
    stored = next(iter(results.values()))
    rates = ", ".join(f"{rule} {lr:g}" for rule, lr in LR_HEBB.items())
    return Section(
        "11. Networks that learn by GHL and by Oja's rule",
        ["Hidden layers of the SRE student trained by each rule, the last by backpropagation. "
         "Cosine at layer 2 of what the rule adds to the weight with B, cosine of the whole update "
         "with B, and the held-out error (the targets' variance is "
         f"{stored['result']['validation_variance']:.1e})."],
        ["", *(f"γ = {d:g}" for d in DECAYS)],
        table,
        "rules.png",
        [f"SGD, {stored['arguments']['steps']} steps of {BATCH}, learning rate {LR:g} and for the "
         f"swapped layers {rates}. `hebb` is Oja's rule under softmax competition, `oja` under "
         "none; both walk along H whatever the loss says. Against a normalised update the same γ "
         "weighs less than against a small gradient."],
    )  # fmt: skip
