"""Where an optimizer's step begins and ends, also one that is made of other steps."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch.optim import optimizer as optimizer_module
from torch.optim.optimizer import Optimizer

from ghl.hooks import nothing, once_gradients_are_made, watch_optimizers, weak

living: weakref.WeakValueDictionary[int, Steps] = weakref.WeakValueDictionary()  # as they came
numbers = itertools.count()


@torch.compiler.disable
def before_any(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """The hook of every optimizer's step."""
    for steps in list(living.values()):
        steps.before(optimizer)


@torch.compiler.disable
def after_any(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for steps in list(living.values()):
        steps.after(optimizer)


def steps_around() -> int:
    """How many optimizers' steps the one that calls its hooks is within.

    Of a step that calls hooks there is one frame, of `profile_hook_step`'s wrapper in torch.optim.
    """
    found = -1  # its own
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
    the outermost counts. None is told any more after `remove`, nor once this is gone.
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
        self._number = next(numbers)
        living[self._number] = self
        watch_optimizers(before_any, after_any)

    def remove(self) -> None:
        self.leave()
        living.pop(self._number, None)

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

    def before(self, optimizer: Optimizer) -> None:
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

    def after(self, optimizer: Optimizer) -> None:
        found = self._of_step(optimizer)
        if not found:
            return
        self._depth -= 1
        if self._depth > 0:
            return
        self._depth = 0
        self.leave()
        self._ended(found)
