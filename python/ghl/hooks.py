"""Hooks that keep nothing alive, that no copy of a module takes with it, that keep their place."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle


def nothing(*args: Any, **kwargs: Any) -> None:
    """What a hook is in a copy of its module."""


def weak(owned: Any, method: str) -> Any:
    """A call of a method that does not keep its object alive; nothing once it is gone."""
    reference = weakref.ref(owned)

    def call(*args: Any, **kwargs: Any) -> Any:
        owner = reference()
        return None if owner is None else getattr(owner, method)(*args, **kwargs)

    return call


@functools.cache
def watch_optimizers(before: Callable[..., None], after: Callable[..., None] = nothing) -> None:
    """Have functions called around the steps of all optimizers, once and for good: a hook that is
    taken off while hooks are called, as a finalizer may do, would break off that step."""
    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def once_gradients_are_made(
    args: tuple,
    kwargs: dict[str, Any],
    then: Callable[[], None],
    before: Callable[[], None] = nothing,
) -> Any:
    """Call `then` from a hook before an optimizer's step: now, or after every call of the closure
    that makes the gradients, which `before` comes before. What the hook has to return."""
    itself, *rest = args
    closure = rest[0] if rest else kwargs.get("closure")
    if not callable(closure):
        then()
        return None

    def closure_and_then(*args: Any, **kwargs: Any) -> Any:
        before()
        with torch.enable_grad():
            loss = closure(*args, **kwargs)
        then()
        return loss

    if rest:
        return (itself, closure_and_then, *rest[1:]), kwargs
    return args, kwargs | {"closure": closure_and_then}


def inert() -> Callable[..., None]:
    return nothing


class Hook:
    """A callable for a module that neither deepcopy nor pickle takes with it."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self.call(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return inert, ()

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        return nothing


def put_behind(handle: RemovableHandle, former: Collection[int]) -> None:
    """Have a hook called right behind the last of these, by id, that are still there: before all
    others."""
    hooks: Any = handle.hooks_dict_ref()
    others = [key for key in hooks if key != handle.id]
    place = max((i for i, key in enumerate(others, 1) if key in former), default=0)
    hooks.update([(key, hooks.pop(key)) for key in others[place:]])


class Switched:
    """A hook that can be turned off, when it costs nothing, and on again, in its place among those
    of others. register: registers it, and returns its handle.

    handles: its own while it is on, for a finalizer to remove: they keep nothing alive.
    """

    def __init__(self, register: Callable[[], RemovableHandle]) -> None:
        self._register = register
        self.handles = [register()]
        self._former: set[int] = set()  # the hooks before it, when it was last on

    def turn(self, on: bool) -> None:
        if on and not self.handles:
            self.handles.append(self._register())
            put_behind(self.handles[0], self._former)
        elif not on and self.handles:
            handle = self.handles.pop()
            hooks = handle.hooks_dict_ref() or {}
            self._former = set(itertools.takewhile(lambda key: key != handle.id, hooks))
            handle.remove()
