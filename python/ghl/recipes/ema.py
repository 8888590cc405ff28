"""An exponential moving average of a model's parameters, to evaluate with.

Buffers are not averaged here: running statistics are averages already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """After every step, average = decay * average + (1 - decay) * parameter.

    The decay rises with the number of steps as (1 + n) / (10 + n), so that the first parameters
    are soon forgotten; sharded parameters have sharded averages.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.parameters = dict(model.named_parameters())
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averages in place of its parameters, inside the context."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(kept)

    def state(self) -> dict[str, Any]:
        """The averages by name, and the number of steps."""
        return {"steps": self.steps, "averages": self.averages}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.steps = state["steps"]
        for name, average in self.averages.items():
            average.copy_(state["averages"][name])

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
