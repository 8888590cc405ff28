"""Direct feedback alignment (Nøkland 2016): hidden layers learn from fixed random projections of
the output's error instead of backpropagated ones.

It rides on autograd, so any loss, optimizer and Monitor take it; what a layer is stays PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Feedback(torch.autograd.Function):
    """The output as it is; in backward every hidden tensor gets the error times its matrix."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, count: int, *rest: Tensor) -> Tensor:
        hidden, matrices = rest[:count], rest[count:]
        ctx.shapes = [h.shape for h in hidden]
        ctx.save_for_backward(*matrices)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Any:
        signals = [
            spread(error @ matrix, shape)
            for matrix, shape in zip(ctx.saved_tensors, ctx.shapes, strict=True)
        ]
        return error, None, *signals, *[None] * len(signals)


def spread(signal: Tensor, shape: torch.Size) -> Tensor:
    """(..., width) in equal parts over the positions that a hidden tensor has in between."""
    positions = len(shape) - signal.dim()
    if positions == 0:
        return signal
    inner = shape[signal.dim() - 1 : -1]
    signal = signal.reshape(*signal.shape[:-1], *[1] * positions, signal.shape[-1])
    return (signal / math.prod(inner)).expand(shape)


def feed_back(output: Tensor, hidden: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
    """`output` (..., outputs), whose error e reaches each hidden tensor (..., width) as e·B.

    matrices: one (outputs, width) for each hidden tensor, with leading dimensions where stacked
    networks have them. The hidden tensors must reach the output through detached copies only, or
    backpropagation adds to the feedback.
    """
    return Feedback.apply(output, len(hidden), *hidden, *matrices)


def draw_matrix(outputs: int, width: int, generator: torch.Generator) -> Tensor:
    """A feedback matrix (outputs, width), normal with variance 1 / outputs."""
    return torch.randn(outputs, width, generator=generator) / math.sqrt(outputs)


class DFA(nn.Module):
    """`blocks` one after the other, trained by direct feedback alignment.

    Inside a block, gradients are ordinary; between blocks there are none: the output of block l
    gets e·B_l with the error e = ∂ℓ/∂output. widths: the last dimension of the output of each block
    but the last; outputs: of the last. The matrices B_l (outputs, width) come from `seed` alone,
    are buffers and so part of the state_dict. Raises ValueError if the numbers do not fit.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], widths: Sequence[int], outputs: int, seed: int
    ) -> None:
        super().__init__()
        if len(widths) != len(blocks) - 1:
            raise ValueError(
                f"widths has {len(widths)} numbers, must have {len(blocks) - 1}: one for each of "
                f"the {len(blocks)} blocks but the last"
            )
        self.blocks = nn.ModuleList(blocks)
        generator = torch.Generator().manual_seed(seed)
        for index, width in enumerate(widths):
            self.register_buffer(f"feedback{index}", draw_matrix(outputs, width, generator))

    def forward(self, x: Tensor) -> Tensor:
        hidden: list[Tensor] = []
        for block in self.blocks:
            x = block(hidden[-1].detach() if hidden else x)
            hidden.append(x)
        *hidden, output = hidden
        matrices = [self.get_buffer(f"feedback{index}") for index in range(len(hidden))]
        return feed_back(output, hidden, matrices)
