"""RandomNN (arXiv 2505.18069): updates out of a random network, which know of no loss.

What keeps the weights from vanishing is only that each update moves a norm towards a target; that
such training looks Hebbian under weight decay is the point of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

HIDDEN, CODE = 128, 4


class RandomNN(nn.Module):
    """An MLP with three hidden layers of 128, tanh, never trained, and a projection per parameter.

    inputs: width of the student's input. parameters: those that it makes updates for, as they are
    before training; all with leading dimensions `stack`, one network for each, each with its own
    numbers from `seed`. clip and target: the largest norm of an update, and the norm that a
    parameter is moved towards, both as shares of its norm before training. Everything random is a
    buffer and so part of the state_dict. Raises ValueError for a share that is not above 0.
    """

    def __init__(
        self,
        inputs: int,
        parameters: Sequence[Tensor],
        seed: int,
        clip: float = 0.01,
        target: float = 1.0,
        stack: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        for name, value in (("clip", clip), ("target", target)):
            if not value > 0:
                raise ValueError(f"{name} is {value!r}, must be greater than 0")
        self.clip, self.target = clip, target
        self.shapes = [tuple(p.shape[len(stack) :]) for p in parameters]
        generator = torch.Generator().manual_seed(seed)
        widths = (inputs, HIDDEN, HIDDEN, HIDDEN, CODE)
        for index, (c, k) in enumerate(pairwise(widths)):
            weight = torch.randn(*stack, c, k, generator=generator) / math.sqrt(c)
            self.register_buffer(f"weight{index}", weight)
            # without biases the network would be odd, and its mean over a batch nothing but noise
            bias = torch.randn(*stack, 1, k, generator=generator)
            self.register_buffer(f"bias{index}", bias)
        for index, (shape, parameter) in enumerate(zip(self.shapes, parameters, strict=True)):
            projection = torch.randn(*stack, CODE, math.prod(shape), generator=generator)
            self.register_buffer(f"projection{index}", projection)
            norm = parameter.detach().reshape(*stack, -1).norm(dim=-1, keepdim=True)
            self.register_buffer(f"norm{index}", norm)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The code (..., 4): the network's output for x (..., rows, inputs), averaged over rows."""
        for index in range(4):
            x = x @ self.get_buffer(f"weight{index}") + self.get_buffer(f"bias{index}")
            x = torch.tanh(x) if index < 3 else x
        return x.mean(-2)

    @torch.no_grad()
    def signals(self, x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """What to add to each parameter (..., *shape), before its learning rate and decay."""
        code = self(x).unsqueeze(-2)
        found = []
        for index, (shape, parameter) in enumerate(zip(self.shapes, parameters, strict=True)):
            direction = (code @ self.get_buffer(f"projection{index}")).squeeze(-2)
            w = parameter.reshape(direction.shape)
            unit = self.get_buffer(f"norm{index}")
            length = direction.norm(dim=-1, keepdim=True)
            direction = direction * (self.clip * unit / length.maximum(self.clip * unit))
            outward = torch.where((direction * w).sum(-1, keepdim=True) < 0, -1.0, 1.0)
            grow = torch.where(w.norm(dim=-1, keepdim=True) < self.target * unit, 1.0, -1.0)
            found.append((direction * outward * grow).view(*direction.shape[:-1], *shape))
        return found
