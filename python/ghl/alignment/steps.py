"""Where an optimizer's step begins and ends, also one that is made of other steps."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from torch.optim import optimizer as optimizer_module
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ghl.hooks import nothing, once_gradients_are_made, weak


def steps_around() -> int:
    """How many optimizers' steps the one that calls its hooks is within."""
    found = -1
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        found += code.co_filename == optimizer_module.__file__ and "wrapper" in code.co_name
        frame = frame.f_back
    return found


class Steps:
    """The steps of optimizers for which `of` gives something.

    made: called with that when a step's gradients are, and with how often its closure has been
        called. ended: called with that after the step.

    A step may be made of others: a subclass calls its base's, a wrapper another optimizer's. Only
    the outermost counts. handles: the hooks, to be taken off by whoever has made this.
    """

    def __init__(
        self,
        of: Callable[[Optimizer], Any],
        made: Callable[[Any, int], None],
        ended: Callable[[Any], None],
    ) -> None:
        self._of, self._made, self._ended = of, made, ended
        self._depth = 0  # of steps within one another
        self._outermost: Any = nothing  # a weak reference to its optimizer
        self._found: Any = None  # what `of` gives for that
        self._late: Any = None  # its hook
        self._closed = False  # whether it has run
        self._calls = 0  # of the step's closure
        self.handles = [
            register_optimizer_step_pre_hook(weak(self, "_before")),
            register_optimizer_step_post_hook(weak(self, "_after")),
        ]

    def leave(self) -> None:
        """Nothing is to be called any more for the step in progress."""
        self._closed, self._calls = False, 0
        self._outermost, self._found = nothing, None
        if self._late is not None:
            self._late.remove()
            self._late = None

    def _of_step(self, optimizer: Optimizer) -> Any:
        """What `of` gives, which is asked once a step."""
        known = self._depth > 0 and self._outermost() is optimizer
        return self._found if known else self._of(optimizer)

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Hooks of one optimizer come after those of all: by then ghl.synchronize has merged."""
        if self._depth > 0:  # unless that step has raised, and not told its end
            self._depth = min(self._depth, steps_around())
        found = self._of_step(optimizer)
        if not found:
            return
        self._depth += 1
        if self._depth == 1:
            self.leave()
            self._outermost, self._found = weakref.ref(optimizer), found
            self._late = optimizer.register_step_pre_hook(weak(self, "_close"))

    def _close(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> Any:
        if self._closed:
            return None
        self._closed = True
        then = partial(self._count, self._found)
        return once_gradients_are_made(args, kwargs, then)

    def _count(self, found: Any) -> None:
        self._calls += 1
        self._made(found, self._calls)

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        found = self._of_step(optimizer)
        if not found:
            return
        self._depth -= 1
        if self._depth > 0:
            return
        self._depth = 0
        self.leave()
        self._ended(found)
