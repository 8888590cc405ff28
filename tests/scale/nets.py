"""Small networks and batches, and the training loop that every way of cutting a batch must equal.

In float64, where the sign of a G that is not exactly zero does not depend on rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ghl

STEPS, BATCH = 10, 24
FEW = 4  # steps, of what is a variant of another scenario
BOTH = (nn.Conv2d, nn.Linear)


class ConvNet(nn.Module):
    """Convolutions of 7 and 4 neurons: uneven shards over 2 ranks, an empty one over 3."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 7, 3, padding=1), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(7, 4, 3, stride=2), nn.Tanh())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 16, 5))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


class Transformer(nn.Module):
    """Two encoder layers on tokens; the layers of their feed-forward parts have rules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        options = {"dropout": 0.0, "batch_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(6, 2, 9, **options) for _ in range(2)
        )
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Branches(nn.Module):
    """A branch that only images with a positive mean take: on some ranks, in some steps, nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh())
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 5))

    def forward(self, x: Tensor) -> Tensor:
        taken = x.flatten(1).mean(1) > 0.1
        x = self.stem(x)
        if taken.any():
            x = x.index_add(0, taken.nonzero()[:, 0], self.branch(x[taken]))
        return self.head(x)


NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv": (ConvNet, "images"),
    "transformer": (Transformer, "tokens"),
    "branches": (Branches, "images"),
}


def make(name: str, rule: str | ghl.Rule = "ghl", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = NETS[name][0]().to(dtype)
    ghl.swap(model, rule, types=BOTH)
    return model


def batch(name: str, step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    target = torch.randint(5, (BATCH,), generator=generator)
    if NETS[name][1] == "tokens":
        return torch.randint(11, (BATCH, 7), generator=generator), target
    return torch.randn(BATCH, 2, 10, 10, generator=generator).to(dtype), target


def loss_of(y: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    """This part's share of the mean over the whole batch, times `scale`."""
    return F.cross_entropy(y.to(torch.float64), target, reduction="sum") * (scale / BATCH)


def grads(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def sgd(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.02, **{"momentum": 0.9, **options})


@functools.cache
@mock.patch.object(torch.distributed, "is_initialized", lambda: False)
def alone(
    name: str, rule: str | ghl.Rule = "ghl", clip: float | None = None, steps: int = STEPS
) -> list[Tensor]:
    """The parameters after these steps in one process with the whole batch in one backward.

    Without synchronize, except where gradients are clipped: then G and not updates must be.
    """
    model = make(name, rule)
    optimizer = sgd(model)
    if clip is not None:
        ghl.synchronize(model, optimizer)
    for step in range(steps):
        x, target = batch(name, step)
        optimizer.zero_grad()
        loss_of(model(x), target).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def backward(model: nn.Module, name: str, step: int, micro: int = 4, scaler: Any = None) -> None:
    """A batch in micro-batches, one backward each."""
    x, target = batch(name, step)
    for piece, wanted in zip(x.chunk(micro), target.chunk(micro), strict=True):
        loss = loss_of(model(piece), wanted)
        (scaler.scale(loss) if scaler else loss).backward()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    name: str = "conv",
    micro: int = 4,
    scaler: Any = None,
    none: bool = True,
    forward: Callable[..., Tensor] | None = None,
) -> list[Tensor]:
    """Ten steps in one process; forward: what to call in place of the model."""
    for step in range(STEPS):
        backward(model if forward is None else forward, name, step, micro, scaler)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=none)
    return list(model.parameters())


def synchronized(name: str = "conv", rule: str | ghl.Rule = "ghl", **options: object) -> Any:
    """A model, its optimizer and the handle."""
    model = make(name, rule)
    optimizer = sgd(model, **options)
    return model, optimizer, ghl.synchronize(model, optimizer)


def expected() -> list[Any]:
    """The gradients after one backward of a whole batch, made in backward."""
    model = make("conv")
    backward(model, "conv", 0, micro=1)
    return [p.grad for p in model.parameters()]
