"""Stacks of small MLPs trained side by side: seeds and settings are one more dimension of a tensor.

Each network has its own data, initialisation, noise and decay, as if trained alone; a batched
matrix product trains ten in little more time than one. `alignment` and `neurons` measure them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ghl.recipes.dfa import draw_matrix, feed_back
from ghl.recipes.random_nn import RandomNN

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda h: h,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Stack:
    """n networks of the same widths: weights (n, K, C) and biases (n, 1, K), as nn.Linear's.

    Drawn as nn.Linear draws them, uniform within ±1/√C. seeds: one for each network.
    """

    def __init__(self, widths: Sequence[int], seeds: Sequence[int], activation: str) -> None:
        self.activation = ACTIVATIONS[activation]
        drawn = [draw(widths, torch.Generator().manual_seed(seed)) for seed in seeds]
        self.weights = [
            torch.stack(w).requires_grad_() for w in zip(*(w for w, _ in drawn), strict=True)
        ]
        self.biases = [
            torch.stack(b).requires_grad_() for b in zip(*(b for _, b in drawn), strict=True)
        ]

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def forward(
        self, x: Tensor, feedback: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Output (n, rows, outputs) for x (n, rows, inputs), and each layer's (h_a, h_b).

        h_b is without bias. feedback: the matrices of direct feedback alignment, if it trains.
        """
        layers, hidden = [], []
        for w, b in zip(self.weights, self.biases, strict=True):
            h = torch.bmm(x, w.mT)
            layers.append((x.detach(), h))
            x = h + b
            if len(layers) < len(self.weights):
                x = self.activation(x)
                hidden.append(x)
                x = x.detach() if feedback else x
        return (feed_back(x, hidden, feedback) if feedback else x), layers


def squared_error(target: Tensor) -> Callable[[Tensor], Tensor]:
    """From outputs to the mean squared error of each network (n), over rows and outputs."""
    return lambda output: (output - target).square().mean((1, 2))


def draw(widths: Sequence[int], generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    weights, biases = [], []
    for c, k in pairwise(widths):
        bound = 1 / math.sqrt(c)
        weights.append((2 * torch.rand(k, c, generator=generator) - 1) * bound)
        biases.append((2 * torch.rand(1, k, generator=generator) - 1) * bound)
    return weights, biases


class Learner:
    """A stack and the rule that trains it: `adam`, `sgd`, `dfa` (with SGD) or `random`.

    decay, noise: γ and σ of each network (n). Decay is added to the gradient, as weight_decay of
    torch.optim.SGD and Adam is; noise is added to every weight before a step's forward.
    """

    def __init__(
        self,
        stack: Stack,
        rule: str,
        lr: float,
        decay: Tensor,
        seed: int,
        noise: Tensor | None = None,
        clip: float = 0.01,
    ) -> None:
        self.stack, self.rule = stack, rule
        self.parameters = stack.parameters
        self.decay, self.noise = decay.view(-1, 1, 1), noise
        self.generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam if rule == "adam" else torch.optim.SGD
        self.optimizer = optimizer(self.parameters, lr)
        n, outputs = len(decay), stack.weights[-1].shape[1]
        self.feedback: list[Tensor] = []
        if rule == "dfa":
            self.feedback = [
                torch.stack([draw_matrix(outputs, w.shape[1], self.generator) for _ in range(n)])
                for w in stack.weights[:-1]
            ]
        self.random: RandomNN | None = None
        if rule == "random":
            inputs = stack.weights[0].shape[2]
            self.random = RandomNN(inputs, self.parameters, seed, clip, stack=(n,))

    def gradients(
        self, x: Tensor, loss: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Leave −S in `.grad` of every parameter; losses (n) and each layer's (h_a, h_b)."""
        self.optimizer.zero_grad()
        output, layers = self.stack.forward(x, self.feedback)
        losses = loss(output)
        if self.random is None:
            losses.sum().backward()
        else:
            signals = self.random.signals(x, self.parameters)
            for p, signal in zip(self.parameters, signals, strict=True):
                p.grad = -signal
        return losses.detach(), layers

    @torch.no_grad()
    def shake(self) -> None:
        """Add the noise of a step to every weight."""
        if self.noise is None:
            return
        scale = self.noise.view(-1, 1, 1)
        for p in self.stack.weights:
            p += scale * torch.randn(p.shape, generator=self.generator)

    @torch.no_grad()
    def step(self) -> None:
        """Add the decay to the gradients and let the optimizer move the parameters."""
        for p in self.parameters:
            assert p.grad is not None
            p.grad += self.decay * p
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Outputs (n, rows, outputs) as they are outside of training."""
        return self.stack.forward(x)[0]


@torch.no_grad()
def alignment(stack: Stack, layers: Sequence[tuple[Tensor, Tensor]], layer: int) -> Tensor:
    """Cosine of S̄ and B̄ (n) of one layer, where `.grad` is −S̄ before decay; NaN where zero."""
    x, h = layers[layer]
    gradient = stack.weights[layer].grad
    assert gradient is not None
    direction = torch.bmm(h.mT, x)
    inner = -(gradient * direction).sum((1, 2))
    return inner / (gradient.flatten(1).norm(dim=1) * direction.flatten(1).norm(dim=1))


@torch.no_grad()
def neurons(stack: Stack, layers: Sequence[tuple[Tensor, Tensor]], layer: int) -> Tensor:
    """As `alignment`, of each neuron: (n, K)."""
    x, h = layers[layer]
    gradient = stack.weights[layer].grad
    assert gradient is not None
    direction = torch.bmm(h.mT, x)
    return -(gradient * direction).sum(2) / (gradient.norm(dim=2) * direction.norm(dim=2))
