"""Hooks that keep nothing alive, and that no copy of a module takes with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def weak(owned: Any, method: str) -> Any:
    """A call of a method that does not keep its object alive; nothing once it is gone."""
    reference = weakref.ref(owned)

    def call(*args: Any, **kwargs: Any) -> Any:
        owner = reference()
        return None if owner is None else getattr(owner, method)(*args, **kwargs)

    return call


def once_gradients_are_made(
    args: tuple,
    kwargs: dict[str, Any],
    then: Callable[[], None],
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Any:
    """Call `then` from a hook before an optimizer's step: now, or after every call of the closure
    that makes the gradients, which is called `inside` a context. What the hook has to return."""
    itself, *rest = args
    closure = rest[0] if rest else kwargs.get("closure")
    if not callable(closure):
        then()
        return None

    def closure_and_then(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad(), inside():
            loss = closure(*args, **kwargs)
        then()
        return loss

    if rest:
        return (itself, closure_and_then, *rest[1:]), kwargs
    return args, kwargs | {"closure": closure_and_then}


def nothing(*args: Any, **kwargs: Any) -> None:
    """What a hook is in a copy of its module."""


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
