"""Experiment 1: classification (SCE), alignment against weight decay for four activations.

CIFAR-10 where it is, else Fashion-MNIST; the report says which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from ghl.recipes import data
from ghl.recipes.figures import save_figure
from ghl.recipes.reproduce.cells import Cell
from ghl.recipes.reproduce.report import Section, mean_std, write_csv
from ghl.recipes.reproduce.students import ACTIVATIONS, Learner, Stack, alignment

DECAYS = (0.0, 1e-3, 5e-3, 2e-2)
SEEDS, EPOCHS, BATCH, LR, HIDDEN = 2, 50, 256, 0.01, (128, 128)
CANDIDATES = ("cifar10", "fashion-mnist")


def find_data(root: str | None) -> str:
    """The name of the data set that `root` holds, CIFAR-10 first; ValueError if it holds none."""
    if root is None:
        raise ValueError("--root: expected the directory of CIFAR-10 or Fashion-MNIST for sce")
    reasons = []
    for name in CANDIDATES:
        try:
            data.load(name, root=root, channels=None, size=data.source(name).size)
            return name
        except FileNotFoundError as error:
            reasons.append(str(error))
    raise FileNotFoundError("; ".join(reasons))


@functools.cache
def load(name: str, root: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, pixels) in [−1, 1] and classes (N), then those of the test set."""
    found = data.load(name, root=root, channels=None, size=data.source(name).size)
    parts = []
    for split in (found.train, found.test):
        images = torch.as_tensor(getattr(split, "data"))  # noqa: B009  torchvision's
        parts += [images.flatten(1).float().div(127.5).sub(1)]
        parts += [torch.as_tensor(getattr(split, "targets"))]  # noqa: B009
    return parts[0], parts[1], parts[2], parts[3]


def cell(
    activation: str, seeds: int, epochs: int, name: str, root: str, decays: list[float]
) -> dict[str, Any]:
    """All decays and seeds of one activation, stacked; cosines (decays, seeds) at layer 2."""
    x, classes, x_test, classes_test = load(name, root)
    stacked = [s for _ in decays for s in range(seeds)]
    stack = Stack([x.shape[1], *HIDDEN, int(classes.max()) + 1], stacked, activation)
    decay = torch.tensor([d for d in decays for _ in range(seeds)])
    learner = Learner(stack, "sgd", LR, decay, 0)
    order = torch.Generator().manual_seed(0)
    cosines = []
    n = len(stacked)
    for epoch in range(epochs):
        shuffled = torch.randperm(len(x), generator=order)
        for step, rows in enumerate(shuffled[: len(x) // BATCH * BATCH].split(BATCH)):
            target = classes[rows]
            _, layers = learner.gradients(x[rows].expand(n, -1, -1), cross_entropy(target))
            if epoch == epochs - 1 and step % 7 == 0:
                cosines.append(alignment(stack, layers, 1))
            learner.step()
    with torch.no_grad():
        output = stack.forward(x_test.expand(n, -1, -1))[0]
        accuracy = (output.argmax(2) == classes_test).float().mean(1) * 100
    shape = (len(decays), seeds)
    cosine = torch.stack(cosines).mean(0)
    norm = stack.weights[1].detach().flatten(1).norm(dim=1)
    return {
        "cosine": cosine.view(shape).tolist(),
        "accuracy": accuracy.view(shape).tolist(),
        "weight_norm": norm.view(shape).tolist(),
    }


def cross_entropy(classes: Tensor) -> Callable[[Tensor], Tensor]:
    """From outputs (n, rows, classes) to the cross-entropy of each network (n), mean over rows."""

    def loss(output: Tensor) -> Tensor:
        n, rows, _ = output.shape
        losses = F.cross_entropy(output.flatten(0, 1), classes.repeat(n), reduction="none")
        return losses.view(n, rows).mean(1)

    return loss


def cells(seeds: int, root: str | None, shorten: int = 1) -> list[Cell]:
    """One cell an activation, with at most SEEDS seeds."""
    name = find_data(root)
    settings = {
        "seeds": min(seeds, SEEDS),
        "epochs": max(1, EPOCHS // shorten),
        "name": name,
        "root": str(Path(str(root)).resolve()),
        "decays": list(DECAYS),
    }
    function = "ghl.recipes.reproduce.sce:cell"
    return [Cell(f"sce-{a}", function, {"activation": a, **settings}) for a in ACTIVATIONS]


def summarize(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
    """Write sce.csv and sce.png; the section of the report."""
    rows, table = [], []
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for stored in results.values():
        activation, result = stored["arguments"]["activation"], stored["result"]
        points = [mean_std(values) for values in result["cosine"]]
        accuracies = [mean_std(values)[0] for values in result["accuracy"]]
        table.append(
            [activation]
            + [
                f"{mean:+.2f} ± {std:.2f} ({accuracy:.1f} %)"
                for (mean, std), accuracy in zip(points, accuracies, strict=True)
            ]
        )
        means, stds = zip(*points, strict=True)
        axes.errorbar(range(len(DECAYS)), means, stds, marker=".", label=activation)
        rows += [
            [activation, decay, seed, cosine, result["accuracy"][i][seed]]
            for i, decay in enumerate(DECAYS)
            for seed, cosine in enumerate(result["cosine"][i])
        ]
    write_csv(out / "sce.csv", ["activation", "decay", "seed", "cosine", "accuracy"], rows)
    axes.set_xticks(range(len(DECAYS)), [f"{d:g}" for d in DECAYS])
    axes.set(xlabel="weight decay γ", ylabel="alignment of layer 2, cosine")
    axes.axhline(0, color="grey", lw=0.7)
    axes.legend()
    save_figure(out / "sce.png", figure)
    settings = next(iter(results.values()))["arguments"]
    return Section(
        "1. Alignment against weight decay in classification (SCE)",
        [f"On {settings['name']}: cosine at the second layer, mean ± standard deviation over "
         f"{settings['seeds']} seeds, in brackets the test accuracy. No published one is at hand."],
        ["", *(f"γ = {d:g}" for d in DECAYS)],
        table,
        "sce.png",
        [f"SGD, learning rate {LR:g}, batches of {BATCH}, {settings['epochs']} epochs, two hidden "
         "layers of 128; the alignment is the mean over every 7th step of the last epoch. Images "
         "scaled to [−1, 1]; seeds share the order of the data."],
    )  # fmt: skip
