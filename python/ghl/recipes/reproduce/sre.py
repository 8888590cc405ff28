"""Student–teacher regression (SRE, arXiv 2505.18069): the data, and MLP students under one rule.

A teacher of the student's architecture with another initialisation labels Gaussian inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghl.recipes.reproduce.students import Learner, Stack, alignment, squared_error

WIDTHS = (32, 128, 128, 32)
TEACHER = 1_000_000  # added to a student's seed


@dataclass(frozen=True)
class Students:
    """Settings of one cell: the paper leaves lr, steps, batch and what is averaged open."""

    rule: str
    lr: float
    steps: int
    batch: int = 64
    activation: str = "tanh"
    examples: int = 20_000
    validation: int = 2_000
    clip: float = 0.01
    layer: int = 1  # the second
    measured: float = 0.2  # the last part of training
    every: int = 7  # odd: signs may alternate
    whole_every: int | None = None  # of the held-out examples, all in one batch

    def __post_init__(self) -> None:
        if self.steps * self.measured < self.every:
            least = math.ceil(self.every / self.measured)
            raise ValueError(f"steps is {self.steps}, must be at least {least} for one measurement")


def teach(seeds: Sequence[int], examples: int) -> tuple[Tensor, Tensor]:
    """Inputs and the teachers' outputs, each (n, examples, 32)."""
    inputs = [
        torch.randn(examples, WIDTHS[0], generator=torch.Generator().manual_seed(TEACHER + s))
        for s in seeds
    ]
    x = torch.stack(inputs)
    teacher = Stack(WIDTHS, [2 * TEACHER + s for s in seeds], "tanh")
    with torch.no_grad():
        return x, torch.cat([teacher.forward(part)[0] for part in x.split(2000, 1)], 1)


def train(
    settings: Students,
    seeds: Sequence[int],
    decay: Tensor,
    noise: Tensor | None = None,
    make: Callable[[Stack, Tensor], Learner] | None = None,
) -> dict[str, Any]:
    """Train one student for each of `seeds`, `decay` and `noise` (n).

    make: the learner of a stack and its decay, where it is not the plain one of the settings.

    Each in the result (n): cosine, loss and validation loss, weight norm of the measured layer; the
    cosine is the mean over the measured steps of training, of that step's batch. `whole`, where
    whole_every asks for it, is that of all held-out examples.
    """
    distinct = list(dict.fromkeys(seeds))
    which = torch.tensor([distinct.index(s) for s in seeds])
    x, y = teach(distinct, settings.examples + settings.validation)
    stack = Stack(WIDTHS, seeds, settings.activation)
    learner = (
        make(stack, decay)
        if make
        else Learner(stack, settings.rule, settings.lr, decay, distinct[0], noise, settings.clip)
    )
    initial_norm = norms(stack, settings.layer)
    order = torch.Generator().manual_seed(distinct[0])
    per_epoch = settings.examples // settings.batch
    first = math.ceil(settings.steps * (1 - settings.measured))
    held_out = slice(settings.examples, None)
    x_out, y_out = x[:, held_out][which], y[:, held_out][which]
    cosines, losses, whole = [], [], []
    for step in range(settings.steps):
        if step % per_epoch == 0:
            shuffled = torch.randperm(settings.examples, generator=order)
        start = step % per_epoch * settings.batch
        rows = shuffled[start : start + settings.batch]
        x_step, y_step = x[:, rows][which], y[:, rows][which]
        learner.shake()
        if settings.whole_every and step >= first and (step - first) % settings.whole_every == 0:
            _, layers = learner.gradients(x_out, squared_error(y_out))
            whole.append(alignment(stack, layers, settings.layer))
        loss, layers = learner.gradients(x_step, squared_error(y_step))
        if step >= first and step % settings.every == 0:
            cosines.append(alignment(stack, layers, settings.layer))
            losses.append(loss)
        learner.step()
    validation = squared_error(y_out)(learner.predict(x_out))
    found = {"whole": torch.stack(whole).mean(0).tolist()} if whole else {}
    return found | {
        "cosine": torch.stack(cosines).mean(0).tolist(),
        "loss": torch.stack(losses).mean(0).tolist(),
        "validation_loss": validation.tolist(),
        "validation_variance": y_out.var((1, 2)).tolist(),
        "weight_norm": norms(stack, settings.layer),
        "initial_norm": initial_norm,
    }


def norms(stack: Stack, layer: int) -> list[float]:
    """The norm of a layer's weight in each network."""
    return stack.weights[layer].detach().flatten(1).norm(dim=1).tolist()
