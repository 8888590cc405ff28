"""Regularisers other than weight decay, for stacks of students: penalties, noise, normalisations.

A regulariser acts at one of three places: beside the loss, on what a neuron passes on, or between
the parameters and the weights that the forward uses. The signal S stays that of the loss alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ghl.recipes.reproduce.students import Learner, Stack

EPSILON = 1e-5  # of batch normalisation, as nn.BatchNorm1d has it
POWER_ITERATIONS = 30  # before the first step; then one a step, as nn.utils.spectral_norm does


class Regulariser:
    """Nothing: what the others start from. strength: (n), what it means is theirs.

    `strength` of those with `by_decay` is the weight decay on all parameters that acts beside them.
    """

    by_decay = False

    def __init__(self, stack: Stack, strength: Tensor, seed: int) -> None:
        self.raw, self.strength = stack.weights, strength
        self.plain = stack.activation
        self.generator = torch.Generator().manual_seed(seed)
        self.training = True
        self.hidden: list[Tensor] = []

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizer moves instead of the weights."""
        return self.raw

    def weights(self) -> list[Tensor]:
        """The weights (n, K, C) of a forward, from the parameters."""
        return self.raw

    def activate(self, h: Tensor) -> Tensor:
        """What neurons pass on, from their outputs with bias (n, rows, K)."""
        self.hidden.append(self.plain(h))
        return self.hidden[-1]

    def penalty(self) -> Tensor | None:
        """What the loss of each network (n) gets added, of the last forward."""
        return None


class L1(Regulariser):
    """λ Σ|w| over all weights."""

    def penalty(self) -> Tensor:
        return self.strength * sum(w.abs().sum((1, 2)) for w in self.raw)


class Activity(Regulariser):
    """λ Σ|h_a| over the hidden neurons, a mean over rows."""

    def penalty(self) -> Tensor:
        return self.strength * sum(x.abs().sum(2).mean(1) for x in self.hidden)


class Dropout(Regulariser):
    """Hidden neurons are silent with probability p = strength, the others louder by 1/(1−p)."""

    def activate(self, h: Tensor) -> Tensor:
        x = self.plain(h)
        if not self.training:
            return x
        kept = 1 - self.strength.view(-1, 1, 1)
        return x * (torch.rand(x.shape, generator=self.generator) < kept) / kept


class BatchNorm(Regulariser):
    """Hidden neurons are normalised over the rows of the batch, without scale and shift."""

    by_decay = True

    def activate(self, h: Tensor) -> Tensor:
        centred = h - h.mean(1, keepdim=True)
        return self.plain(centred / (centred.square().mean(1, keepdim=True) + EPSILON).sqrt())


class WeightNorm(Regulariser):
    """w_k = g_k v_k / ‖v_k‖ for every neuron (Salimans & Kingma 2016); both are decayed."""

    by_decay = True

    def __init__(self, stack: Stack, strength: Tensor, seed: int) -> None:
        super().__init__(stack, strength, seed)
        self.lengths = [w.detach().norm(dim=2, keepdim=True).requires_grad_() for w in self.raw]

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.raw, *self.lengths]

    def weights(self) -> list[Tensor]:
        return [
            g * F.normalize(v, dim=2, eps=0) for g, v in zip(self.lengths, self.raw, strict=True)
        ]


class Spectral(Regulariser):
    """λ/2 Σ σ² of the largest singular value of every weight (Yoshida & Miyato 2017)."""

    def __init__(self, stack: Stack, strength: Tensor, seed: int) -> None:
        super().__init__(stack, strength, seed)
        self.left = [torch.randn(*w.shape[:2], 1, generator=self.generator) for w in self.raw]
        for _ in range(POWER_ITERATIONS):
            self.largest()

    def largest(self) -> list[Tensor]:
        """The largest singular value (n) of each weight, after one more power iteration."""
        found = []
        for index, w in enumerate(self.raw):
            with torch.no_grad():
                right = F.normalize(w.mT @ self.left[index], dim=1)
                self.left[index] = F.normalize(w @ right, dim=1)
            found.append((self.left[index].mT @ w @ right).flatten())
        return found

    def penalty(self) -> Tensor | None:
        return self.strength / 2 * sum(s.square() for s in self.largest())


class SpectralNorm(Spectral):
    """Weights are divided by their largest singular value (Miyato 2018)."""

    by_decay = True

    def weights(self) -> list[Tensor]:
        return [w / s.view(-1, 1, 1) for w, s in zip(self.raw, self.largest(), strict=True)]

    def penalty(self) -> Tensor | None:
        return None


REGULARISERS: dict[str, type[Regulariser]] = {
    "l1": L1,
    "activity": Activity,
    "dropout": Dropout,
    "spectral": Spectral,
    "batch-norm": BatchNorm,
    "weight-norm": WeightNorm,
    "spectral-norm": SpectralNorm,
}


class Regularised(Learner):
    """SGD students under a regulariser; `.grad` of the stack's weights is −S of the loss alone."""

    def __init__(self, stack: Stack, kind: str, lr: float, strength: Tensor, seed: int) -> None:
        regulariser = REGULARISERS[kind]
        decay = strength if regulariser.by_decay else torch.zeros_like(strength)
        super().__init__(stack, "sgd", lr, decay, seed)
        self.regulariser = regulariser(stack, strength, seed)
        self.parameters = [*self.regulariser.parameters, *stack.biases]
        self.optimizer = torch.optim.SGD(self.parameters, lr)
        self.penalties: tuple[Tensor | None, ...] = ()
        stack.activation = self.regulariser.activate

    def gradients(
        self, x: Tensor, loss: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        self.optimizer.zero_grad()
        output, layers = self.forward(x)
        for w in self.stack.weights:
            w.retain_grad()
        penalty, self.penalties = self.regulariser.penalty(), ()
        if penalty is not None:
            self.penalties = torch.autograd.grad(
                penalty.sum(), self.parameters, retain_graph=True, allow_unused=True
            )
        losses = loss(output)
        losses.sum().backward()
        return losses.detach(), layers

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        self.regulariser.hidden.clear()
        self.stack.weights = self.regulariser.weights()
        return self.stack.forward(x)

    @torch.no_grad()
    def step(self) -> None:
        for p, gradient in zip(self.parameters, self.penalties, strict=False):
            if gradient is not None:
                assert p.grad is not None
                p.grad += gradient
        super().step()

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        self.regulariser.training = False
        output, _ = self.forward(x)
        self.regulariser.training = True
        return output
