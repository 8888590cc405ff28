"""The transformer students of SRE (arXiv 2505.18069), measured by the Monitor as they train.

Tokens are embedded and encoded, the mean of the encoder's output goes through the same MLP as in
`sre.py`; a frozen teacher of the same form labels random token sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghl.alignment import Monitor
from ghl.recipes.dfa import DFA
from ghl.recipes.random_nn import RandomNN

VOCABULARY, LENGTH, WIDTH = 16, 32, 32
HIDDEN = 128
LAYER = "head.2"  # the second layer of the MLP


class Encode(nn.Module):
    """Token and position embeddings (rows, tokens, 32), added, and two encoder layers on them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout=0.0, batch_first=True)
            for _ in range(2)
        )

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


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
            parts = [self.encode, nn.Sequential(Mean(), self.head[:2]), self.head[2:4]]
            blocks = [*parts, self.head[4]]
            self.dfa = DFA(blocks, (WIDTH, HIDDEN, HIDDEN), WIDTH, feedback_seed)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.dfa is not None:
            return self.dfa(tokens)
        return self.head(self.encode(tokens).mean(1))


class Mean(nn.Module):
    """Over the tokens of each row."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def batches(
    seed: int, examples: int, batch: int, teacher: nn.Module
) -> list[tuple[Tensor, Tensor]]:
    """Token sequences and what the teacher says; each batch has one random length up to 32."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(examples // batch):
        length = int(torch.randint(1, LENGTH + 1, (), generator=generator))
        tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
        with torch.no_grad():
            found.append((tokens, teacher(tokens)))
    return found


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
) -> dict[str, Any]:
    """Train one student; its alignment is the mean over the measured steps of the last part."""
    teacher = draw_student(2_000_000 + seed)
    data = batches(1_000_000 + seed, examples, batch, teacher)
    held_out = batches(3_000_000 + seed, validation, batch, teacher)
    student = draw_student(seed, feedback_seed=seed if rule == "dfa" else None)
    weight = student.second.weight
    initial_norm = float(weight.detach().norm())
    parameters = list(student.parameters())
    kind = torch.optim.Adam if rule == "adam" else torch.optim.SGD
    optimizer = kind(parameters, lr, weight_decay=decay)
    random = RandomNN(WIDTH, parameters, seed, clip) if rule == "random" else None
    monitor: Monitor | None = None
    cosines, losses = [], []
    for step, (tokens, target) in enumerate(forever(data, seed, steps)):
        if monitor is None and step >= steps * (1 - measured):
            given = "autograd" if random is None else "given"
            monitor = Monitor(student, every=every, signal=given, statistic="batch")
        optimizer.zero_grad()
        loss = F.mse_loss(student(tokens), target)
        if random is None:
            loss.backward()
        else:
            take_random(random, student, tokens, parameters, monitor)
        measuring = monitor is not None and monitor.measuring
        optimizer.step()
        if monitor is not None and measuring:
            part = monitor.report()[LAYER]["batch"]
            cosines.append(part["cosine"] if part else float("nan"))
            losses.append(float(loss.detach()))
    with torch.no_grad():
        errors = [float(F.mse_loss(student(x), y)) for x, y in held_out]
    return {
        "cosine": sum(cosines) / len(cosines),
        "loss": sum(losses) / len(losses),
        "validation_loss": sum(errors) / len(errors),
        "validation_variance": float(torch.cat([y for _, y in held_out]).var(0).mean()),
        "weight_norm": float(weight.detach().norm()),
        "initial_norm": initial_norm,
    }


def forever(
    data: list[tuple[Tensor, Tensor]], seed: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches, in a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.randperm(len(data), generator=generator).tolist()
        yield data[order.pop()]


def take_random(
    random: RandomNN,
    student: Student,
    tokens: Tensor,
    parameters: list[nn.Parameter],
    monitor: Monitor | None,
) -> None:
    """Leave RandomNN's −S in `.grad`; its input is the mean embedding of each row's tokens."""
    with torch.no_grad():
        rows = student.encode.embed(tokens).mean(1)
    signals = random.signals(rows, parameters)
    for parameter, signal in zip(parameters, signals, strict=True):
        parameter.grad = -signal
        if monitor is not None and parameter is student.second.weight:
            monitor.measure(LAYER, signal)
