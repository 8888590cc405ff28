"""Experiment 2: alignment of the second layer by learning rule and weight decay (Table 1).

Settings that the paper leaves open are here, in one place, and go into the report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ghl.recipes.figures import save_figure
from ghl.recipes.reproduce import sre
from ghl.recipes.reproduce.cells import Cell
from ghl.recipes.reproduce.report import Section, mean_std, write_csv

DECAYS = (0.0, 5e-5, 5e-4, 5e-3)
# Table 1 of arXiv 2505.18069, from a secondary source; None where it says collapse.
PUBLISHED: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("mlp", "adam"): (-0.02, 0.10, 0.66, None),
    ("mlp", "sgd"): (-0.10, -0.06, 0.17, 0.59),
    ("mlp", "dfa"): (0.45, 0.45, 0.68, 0.87),
    ("mlp", "random"): (0.00, 0.00, 0.05, 0.50),
    ("transformer", "adam"): (-0.02, 0.50, 0.99, None),
    ("transformer", "sgd"): (0.00, 0.04, 0.47, 0.88),
}
# Chosen here: the paper gives neither learning rates nor lengths.
LR = {
    "mlp": {"adam": 1e-3, "sgd": 0.1, "dfa": 0.1, "random": 0.3},
    "transformer": {"adam": 1e-3, "sgd": 0.5, "dfa": 0.5, "random": 0.3},
}
STEPS = {
    "mlp": {"adam": 6000, "sgd": 4000, "dfa": 6000, "random": 4000},
    "transformer": {"adam": 2000, "sgd": 2000, "dfa": 2000, "random": 1500},
}
CLIP = 0.004
WHOLE_EVERY = 50
NAMES = {"adam": "Adam", "sgd": "SGD", "dfa": "DFA", "random": "RandomNN"}
ABOUT = {
    "transformer": "Transformer: sequences of 1 to 32 random tokens each, padded and masked within "
    "a batch; learned token and position embeddings, added; no dropout. Under DFA the encoder, "
    "with the mean over its tokens, is one block, trained inside by backpropagation from its own "
    "feedback."
}
SHRUNK = 0.25  # of the initial norm
COLLAPSED = 0.7  # of the targets' variance: an output that ignores its input leaves all of it


def mlp_cell(
    rule: str, decay: float, seeds: Sequence[int], steps: int, whole_every: int
) -> dict[str, Any]:
    """All seeds of one rule and one γ, stacked."""
    settings = sre.Students(
        rule=rule, lr=LR["mlp"][rule], steps=steps, clip=CLIP, whole_every=whole_every
    )
    return sre.train(settings, seeds, torch.full((len(seeds),), decay))


def cells(networks: Sequence[str], seeds: Mapping[str, int], shorten: int = 1) -> list[Cell]:
    """The cells of the table; shorten: divisor of the number of steps, for a trial."""
    found = []
    here = "ghl.recipes.reproduce"
    for network in networks:
        for rule, steps in STEPS[network].items():
            steps //= shorten
            for decay in DECAYS:
                name = f"table-{network}-{rule}-{decay:g}"
                if network == "mlp":
                    arguments = {"rule": rule, "decay": decay, "steps": steps}
                    arguments |= {"seeds": list(range(seeds["mlp"])), "whole_every": WHOLE_EVERY}
                    function = f"{here}.table:mlp_cell"
                    found.append(Cell(name, function, arguments, cost=steps * seeds["mlp"] / 5))
                    continue
                for seed in range(seeds["transformer"]):
                    arguments = {
                        "rule": rule,
                        "decay": decay,
                        "seed": seed,
                        "lr": LR[network][rule],
                    }
                    arguments |= {"steps": steps, "clip": CLIP, "whole_every": WHOLE_EVERY}
                    function = f"{here}.transformer:cell"
                    found.append(Cell(f"{name}-{seed}", function, arguments, cost=steps * 5))
    return found


def collect(
    results: Mapping[str, dict[str, Any]],
) -> dict[tuple[str, str, float], dict[str, list[float]]]:
    """{(network, rule, γ): {quantity: value of each seed}} of the cells that are there."""
    found: dict[tuple[str, str, float], dict[str, list[float]]] = {}
    for name, stored in results.items():
        _, network, rule, *_ = name.split("-")
        decay = stored["arguments"]["decay"]
        quantities = found.setdefault((network, rule, decay), {})
        for quantity, value in stored["result"].items():
            values = value if isinstance(value, list) else [value]
            quantities.setdefault(quantity, []).extend(values)
    return found


def collapsed(quantities: Mapping[str, Sequence[float]]) -> bool:
    """Whether the weights have shrunk to little, and the outputs to next to nothing."""
    error, variance, norm, initial = (
        sum(quantities[name])
        for name in ("validation_loss", "validation_variance", "weight_norm", "initial_norm")
    )
    return error > COLLAPSED * variance and norm < SHRUNK * initial


def summarize_transformer(results: Mapping[str, dict[str, Any]], out: Path) -> Section:
    """As `summarize`, into transformer.csv and transformer.png."""
    return summarize(results, out, "transformer")


def summarize(results: Mapping[str, dict[str, Any]], out: Path, name: str = "table") -> Section:
    """Write a CSV file and a figure of that name; the section of the report."""
    found = collect(results)
    rows, table = [], []
    for network, rule in dict.fromkeys((n, r) for n, r, _ in found):
        line = [f"{network} {NAMES[rule]}"]
        published = PUBLISHED.get((network, rule))
        for index, decay in enumerate(DECAYS):
            quantities = found.get((network, rule, decay))
            if quantities is None:
                line.append("")
                continue
            found_here = [mean_std(quantities[name]) for name in ("cosine", "whole")]
            gone = collapsed(quantities)
            rows.append([
                network, rule, decay, len(quantities["cosine"]), *found_here[0], *found_here[1],
                gone, mean_std(quantities["validation_loss"])[0],
                mean_std(quantities["weight_norm"])[0], published[index] if published else None,
            ])  # fmt: skip
            line.append(f"{ours(found_here, gone)} ({published_text(published, index)})")
        table.append(line)
    head = "network rule decay seeds cosine std whole whole_std collapsed validation_loss"
    head += " weight_norm published"
    write_csv(out / f"{name}.csv", head.split(), rows)
    save_figure(out / f"{name}.png", draw(rows))
    return Section(
        f"2. Alignment by rule and weight decay (SRE, {networks_of(found)})",
        ["Cosine at the second layer of the MLP, mean ± standard deviation over seeds: of a step's "
         "batch of 64, then of the 2,000 held-out examples in one batch, and in brackets the "
         "published figure (–: none at hand), of which we do not know what batch it is of."],
        ["", *(f"γ = {d:g}" for d in DECAYS)],
        table,
        f"{name}.png",
        notes(found),
    )  # fmt: skip


def ours(found: Sequence[tuple[float, float]], gone: bool) -> str:
    """Mean and deviation of each statistic; weights of zero have no direction."""
    if any(math.isnan(mean) for mean, _ in found):
        return "collapse"
    return ", ".join(f"{mean:.2f} ± {std:.2f}" for mean, std in found) + gone * " collapse"


def networks_of(found: Mapping[tuple[str, str, float], Any]) -> str:
    return " and ".join(dict.fromkeys(network for network, _, _ in found))


def published_text(published: Sequence[float | None] | None, index: int) -> str:
    if published is None:
        return "–"
    value = published[index]
    return "collapse" if value is None else f"{value:.2f}"


def notes(found: Mapping[tuple[str, str, float], Any]) -> list[str]:
    networks = dict.fromkeys(n for n, _, _ in found)

    def listed(values: Mapping[str, Mapping[str, float]]) -> str:
        return "; ".join(
            ", ".join(f"{NAMES[r]} {v:g}" for r, v in values[n].items()) for n in networks
        )

    lrs, steps = listed(LR), listed(STEPS)
    return [
        f"Chosen here, as the paper leaves it open: learning rates {lrs}; steps {steps} (fewer "
        "where the cells say so); batches of 64; loss: the mean over rows and outputs; weights and "
        "biases drawn as nn.Linear draws them; weight decay added to the gradient (for Adam too, "
        "before its scaling) and on biases too; the alignment is the mean over every 7th step of "
        "the last fifth of training, each of its own batch.",
        "Where ours differ by more than their spread: a small batch's noise hides the mean signal, "
        "so that the figures move with the batch that they are of (both columns, and the section "
        "on the transformer with less noise), with the length of training (the sections on it, "
        "for SGD and DFA), and with the clip of RandomNN.",
        f"RandomNN: updates clipped to {CLIP:g} of a parameter's initial norm, that norm the "
        "target, normal biases of variance 1 in the random network. Where the norm hovers at its "
        "target, the mean cosine is proportional to γ/clip: it is set by the clip, not measured "
        "free of it.",
        "DFA: feedback matrices normal with variance 1/32.",
        *(ABOUT[network] for network in networks if network in ABOUT),
        f"Collapse: the held-out error is above {COLLAPSED:.0%} of the targets' variance, and the "
        f"layer's norm below {SHRUNK:.0%} of its initial one.",
    ]


def draw(rows: Sequence[Sequence[Any]]) -> Figure:
    """Alignment against γ, one line a rule; dotted the published figures."""
    networks = list(dict.fromkeys(row[0] for row in rows))
    figure = Figure(figsize=(5.5 * len(networks), 4), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        for index, rule in enumerate(NAMES):
            points = [row for row in rows if row[:2] == [network, rule]]
            places = [DECAYS.index(row[2]) for row in points]
            for column, style in ((4, "-"), (6, "--")):
                means, stds = ([row[c] for row in points] for c in (column, column + 1))
                label = NAMES[rule] if column == 4 else None
                axes.errorbar(places, means, stds, ls=style, color=f"C{index}", label=label)
            known = [(p, row[11]) for p, row in zip(places, points, strict=True)]
            known = [(p, v) for p, v in known if v is not None]
            axes.plot(*zip(*known, strict=True), "x:", color=f"C{index}") if known else None
        axes.set_xticks(range(len(DECAYS)), [f"{d:g}" for d in DECAYS])
        axes.axhline(0, color="grey", lw=0.7)
        axes.set_xlabel("weight decay γ")
        axes.set_title(f"{network} (dashed: of 2,000 examples, dotted: published)")
    panels[0].set_ylabel("alignment, cosine")
    panels[0].legend()
    return figure
