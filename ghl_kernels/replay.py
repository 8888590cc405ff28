"""Calls of an operator like earlier ones, played from a tape instead of led through the dispatcher.

Where a GPU ends kernels faster than Python launches them, a training step waits for Python
(bench/FACTS.md). The first call of a kind goes its whole way, on which kernels are tried and
compiled; the second is recorded; the rest are played.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghl_kernels import dispatch, player
from ghl_kernels.dispatch import Backend
from ghl_kernels.recorder import record, recorder
from ghl_kernels.tape import Tape

MOST_TAPES = 4096
TENSORS = 4  # the first arguments: x, y, g and w, or G, H0, totals and w
NEVER = "never played"


class Played(NamedTuple):
    """A tape, what the call took that it was made of, and the same tape for csrc/replay."""

    tape: Tape
    backend: Backend
    compiled: Any


# of a kind: what its first call took, then how later ones are played
Found = Backend | Played | str

_tapes: dict[tuple[Any, ...], Found] = {}


def lie(t: Tensor) -> tuple[Any, ...]:
    """All that a call depends on of a tensor that is strided."""
    return t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16


def kind(operator: str, tensors: tuple[Tensor, ...], rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """What calls have in common that do the same to other numbers."""
    choices = (tuple(one) if isinstance(one, list) else one for one in rest)
    return (operator, dispatch.state(tensors[0]), *map(lie, tensors), *choices)


def replayed(operator: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, from the third call of a kind on by its tape; for tensors on a GPU."""

    @functools.wraps(run)
    def call(*arguments: Any) -> Any:
        tensors, rest = arguments[:TENSORS], arguments[TENSORS:]
        if not on_gpu(tensors[0]) or dispatch.is_forced() or not all(map(is_strided, tensors)):
            return run(*arguments)
        key = kind(operator, tensors, rest)
        found = _tapes.get(key)
        if isinstance(found, Played):
            dispatch.note(operator, found.backend)
            player.offer(found.compiled)
            return found.tape.play(tensors)
        if isinstance(found, str) or (found is not None and not is_recordable(tensors)):
            return run(*arguments)
        result, taped = (run(*arguments), None) if found is None else record(run, tensors, *rest)
        backend = dispatch.settled_last(operator)
        if found is None or (taped is not None and backend != found):
            remember(key, backend)
        elif taped is None:
            remember(key, NEVER)
        else:
            compiled = player.made_of(taped, dispatch.noted(found))
            player.offer(compiled)
            remember(key, Played(taped, found, compiled))
        return result

    return call


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
