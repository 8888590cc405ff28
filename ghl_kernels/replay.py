"""Calls of an operator like earlier ones, played from a tape instead of led through the dispatcher.

Where a GPU ends kernels faster than Python launches them, a training step waits for Python
(bench/FACTS.md). The first call of a kind goes its whole way, on which kernels are tried and
compiled; the second is recorded; the rest are played.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghl_kernels import dispatch
from ghl_kernels.dispatch import Backend
from ghl_kernels.tapes import player
from ghl_kernels.tapes.recorder import record, recorder
from ghl_kernels.tapes.tape import Tape

MOST_TAPES = 4096
TENSORS = 4  # the first arguments: x, y, g and w, or G, H0, totals and w, or lists of these
NEVER = "never played"


class Played(NamedTuple):
    """A tape, and what the call took that it was made of."""

    tape: Tape
    backend: Backend


# of a kind: what its first call took, then how later ones are played
Found = Backend | Played | str

_tapes: dict[tuple[Any, ...], Found] = {}


class Form(NamedTuple):
    """How a call takes its tensors, and gives them: one by one, or lists of `each`."""

    each: int | None

    @classmethod
    def of(cls, first: Sequence[Any]) -> Form | None:
        """None for lists that do not go together."""
        if isinstance(first[0], Tensor):
            return cls(None)
        each = {len(one) for one in first}
        return cls(each.pop()) if len(each) == 1 and each != {0} else None

    def flat(self, values: Sequence[Any]) -> tuple[Tensor, ...]:
        return tuple(values if self.each is None else itertools.chain.from_iterable(values))

    def formed(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The inverse of `flat`."""
        if self.each is None:
            return tuple(tensors)
        starts = range(0, len(tensors), self.each)
        return tuple([list(tensors[i : i + self.each]) for i in starts])


def lie(t: Tensor) -> tuple[Any, ...]:
    """All that a call depends on of a tensor that is strided; as `append_tensor` of csrc/replay."""
    return t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16


def kind(operator: str, tensors: tuple[Tensor, ...], rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """What calls have in common that do the same to other numbers."""
    choices = (tuple(one) if isinstance(one, list) else one for one in rest)
    return (operator, dispatch.state(tensors[0]), *map(lie, tensors), *choices)


def replayed(operator: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, from the third call of a kind on by its tape; for tensors on a GPU."""

    @functools.wraps(run)
    def call(*arguments: Any) -> Any:
        form, rest = Form.of(arguments[:TENSORS]), arguments[TENSORS:]
        tensors = () if form is None else form.flat(arguments[:TENSORS])
        if form is None or not is_playable(tensors) or dispatch.is_forced():
            return run(*arguments)
        begun, key = player.forgotten(), kind(operator, tensors, rest)
        found = _tapes.get(key)
        if isinstance(found, Played):
            dispatch.note(operator, found.backend)
            return form.formed(found.tape.play(tensors))
        if isinstance(found, str) or (found is not None and not is_recordable(tensors)):
            return run(*arguments)
        taped = None
        if found is None:
            result = run(*arguments)
        else:
            results, taped = record(in_form(run, form), tensors, *rest)
            result = form.formed(results)
        backend = dispatch.settled_last(operator)
        if found is None or (taped is not None and backend != found):
            remember(key, backend)
        elif taped is None:
            remember(key, NEVER)
        else:
            remember(key, Played(taped, found))
            if not player.keep(operator, arguments, taped, dispatch.noted(found), begun):
                _tapes.clear()  # to have them recorded again
        return result

    return call


def in_form(run: Callable[..., Any], form: Form) -> Callable[..., tuple[Tensor, ...]]:
    """A call with its tensors one by one."""

    def call(*values: Any) -> tuple[Tensor, ...]:
        count = TENSORS * (form.each or 1)
        return form.flat(run(*form.formed(values[:count]), *values[count:]))

    return call


def is_playable(tensors: Sequence[Tensor]) -> bool:
    return on_gpu(tensors[0]) and all(map(is_strided, tensors))


def is_recordable(tensors: tuple[Tensor, ...]) -> bool:
    """Not where two are one, which others' need not be, not within another call, and not for a
    graph."""
    distinct = len({id(t) for t in tensors}) == len(tensors)
    return distinct and recorder() is None and not torch.cuda.is_current_stream_capturing()


def on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def is_strided(t: Tensor) -> bool:
    return t.layout == torch.strided


def remember(key: tuple[Any, ...], found: Found | None) -> None:
    """None: the next call is a first one again."""
    if len(_tapes) >= MOST_TAPES:
        _tapes.clear()
    if found is None:
        _tapes.pop(key, None)
    else:
        _tapes[key] = found
