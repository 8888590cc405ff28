"""The transformer students of SRE (arXiv 2505.18069), measured by the Monitor as they train.

Tokens are embedded and encoded, the mean of the encoder's output goes through the same MLP as in
`sre.py`; a frozen teacher of the same form labels random token sequences of random lengths.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghl.alignment import Monitor
from ghl.recipes.dfa import DFA
from ghl.recipes.random_nn import RandomNN

VOCABULARY, LENGTH, WIDTH = 16, 32, 32
PADDING = VOCABULARY  # the token behind the end of a sequence
HIDDEN = 128
LAYER = "head.2"  # the second layer of the MLP


class Encode(nn.Module):
    """Tokens (rows, length), padded with PADDING, to the mean of the encoder's output (rows, 32).

    Token and position embeddings are added, and two encoder layers are on them; padding takes no
    part in attention nor in the mean.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY + 1, WIDTH, padding_idx=PADDING)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout=0.0, batch_first=True)
            for _ in range(2)
        )

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]

    def forward(self, tokens: Tensor) -> Tensor:
        x, padding = self.embed(tokens), tokens == PADDING
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return mean(x, padding)


def mean(x: Tensor, padding: Tensor) -> Tensor:
    """Of x (rows, length, width) over what is not padding (rows, length)."""
    kept = (~padding).unsqueeze(-1).to(x.dtype)
    return (x * kept).sum(1) / kept.sum(1)


class Student(nn.Module):
    """Tokens (rows, length) to (rows, 32). Under DFA each block of the head has feedback, and so
    has the encoder as a whole."""

    def __init__(self, feedback_seed: int | None) -> None:
        super().__init__()
        self.encode = Encode()
        self.head = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.Tanh(),
            nn.Linear(HIDDEN, HIDDEN), nn.Tanh(),
            nn.Linear(HIDDEN, WIDTH),
        )  # fmt: skip
        self.second: nn.Linear = self.head[2]  # type: ignore[assignment]
        self.dfa: DFA | None = None
        if feedback_seed is not None:
            blocks = [self.encode, self.head[:2], self.head[2:4], self.head[4]]
            self.dfa = DFA(blocks, (WIDTH, HIDDEN, HIDDEN), WIDTH, feedback_seed)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encode(tokens)) if self.dfa is None else self.dfa(tokens)


def draw_data(seed: int, examples: int, teacher: nn.Module) -> tuple[Tensor, Tensor]:
    """Random sequences (examples, 32), each of a random length from 1 on, and what the teacher
    says."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (examples, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (examples, 1), generator=generator)
    tokens[torch.arange(LENGTH) >= lengths] = PADDING
    with torch.no_grad():
        return tokens, torch.cat([teacher(part) for part in tokens.split(500)])


def draw_student(seed: int, feedback_seed: int | None = None) -> Student:
    """A student whose initialisation depends on `seed` alone; the global generator is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Student(feedback_seed)


def cell(
    rule: str,
    decay: float,
    seed: int,
    lr: float,
    steps: int,
    batch: int = 64,
    examples: int = 20_000,
    validation: int = 2_000,
    clip: float = 0.01,
    measured: float = 0.2,
    every: int = 7,
    whole_every: int = 50,
    settling: int = 0,
) -> dict[str, Any]:
    """Train one student; `cosine` is the mean over the measured steps of the last part, each of its
    own batch, `whole` over every `whole_every` steps, of all held-out examples.

    settling: the last steps, which go at a tenth of the learning rate.
    """
    teacher = draw_student(2_000_000 + seed)
    data = draw_data(1_000_000 + seed, examples, teacher)
    held_out = draw_data(3_000_000 + seed, validation, teacher)
    student = draw_student(seed, feedback_seed=seed if rule == "dfa" else None)
    weight = student.second.weight
    initial_norm = float(weight.detach().norm())
    parameters = list(student.parameters())
    kind = torch.optim.Adam if rule == "adam" else torch.optim.SGD
    optimizer = kind(parameters, lr, weight_decay=decay)
    random = RandomNN(WIDTH, parameters, seed, clip) if rule == "random" else None
    first = int(steps * (1 - measured))
    cosines, losses, whole = [], [], []
    for step, (tokens, target) in enumerate(shuffled(*data, batch, seed, steps)):
        if step >= first and (step - first) % whole_every == 0:
            whole.append(measure(student, random, *held_out)[1])
        if step >= first and (step - first) % every == 0:
            loss, found = measure(student, random, tokens, target)
            losses.append(loss)
            cosines.append(found)
        if step == steps - settling:
            for group in optimizer.param_groups:
                group["lr"] = lr / 10
        optimizer.zero_grad()
        learn(student, random, tokens, target)
        optimizer.step()
    with torch.no_grad():
        error = float(F.mse_loss(student(held_out[0]), held_out[1]))
    return {
        "cosine": sum(cosines) / len(cosines),
        "whole": sum(whole) / len(whole),
        "loss": sum(losses) / len(losses),
        "validation_loss": error,
        "validation_variance": float(held_out[1].var(0).mean()),
        "weight_norm": float(weight.detach().norm()),
        "initial_norm": initial_norm,
    }


def learn(
    student: Student, random: RandomNN | None, tokens: Tensor, target: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Leave −S in `.grad` of every parameter; the loss, and RandomNN's S of the measured layer."""
    loss = F.mse_loss(student(tokens), target)
    if random is None:
        loss.backward()
        return loss.detach(), None
    with torch.no_grad():  # its input is the mean embedding of each row's tokens
        rows = mean(student.encode.embed(tokens), tokens == PADDING)
    parameters = list(student.parameters())
    signals = random.signals(rows, parameters)
    for parameter, signal in zip(parameters, signals, strict=True):
        parameter.grad = -signal
    (found,) = (s for p, s in zip(parameters, signals, strict=True) if p is student.second.weight)
    return loss.detach(), found


def measure(
    student: Student, random: RandomNN | None, tokens: Tensor, target: Tensor
) -> tuple[float, float]:
    """Loss and alignment of a batch, by a Monitor on a copy, of which the training sees nothing."""
    copied = copy.deepcopy(student)
    copied.zero_grad()
    given = "autograd" if random is None else "given"
    with Monitor(copied, signal=given, statistic="batch") as monitor:
        loss, signal = learn(copied, random, tokens, target)
        if signal is not None:
            monitor.measure(LAYER, signal)
        part = monitor.report()[LAYER]["batch"]
    return float(loss), part["cosine"] if part else float("nan")


def shuffled(
    tokens: Tensor, target: Tensor, batch: int, seed: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches, in a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    for _ in range(steps):
        if not order:
            order = list(torch.randperm(len(tokens), generator=generator).split(batch))
            order = [rows for rows in order if len(rows) == batch]
        rows = order.pop()
        yield tokens[rows], target[rows]
