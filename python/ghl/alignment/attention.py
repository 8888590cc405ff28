"""The projections of nn.MultiheadAttention, which are function calls and no modules.

Only on measured steps: a mode catches the one call that computes attention and runs the same code
with its `linear` observed. PyTorch's own functions and globals stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Seen = Callable[[Tensor, Tensor, "Tensor | None", Tensor], None]
HELPERS = ("_in_projection_packed", "_in_projection", "multi_head_attention_forward")


def observed(seen: Seen) -> Callable[..., Any]:
    """F.multi_head_attention_forward, telling `seen` x, weight, bias and y of each projection."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        seen(x, weight, bias, y)
        return y

    names = {**vars(F), "linear": linear}
    for name in HELPERS:
        original = getattr(F, name)
        copy = FunctionType(original.__code__, names, name, original.__defaults__)
        copy.__kwdefaults__ = original.__kwdefaults__
        names[name] = copy
    return names["multi_head_attention_forward"]


class Projections(TorchFunctionMode):
    """While it is on, attention computed by torch.nn.functional reports its projections."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.multi_head_attention_forward:
            func = observed(self.seen)
        return func(*args, **(kwargs or {}))

    def leave(self) -> None:
        """End it, whatever has become of the forward that it was begun in; not within one, where it
        is on no more while it is asked, nor in another thread, which has modes of its own."""
        if torch.overrides._get_current_function_mode_stack()[-1:] == [self]:
            self.__exit__(None, None, None)
