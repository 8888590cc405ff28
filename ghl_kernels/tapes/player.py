"""Tapes played by csrc/replay, without Python: where it was built for this torch and this Python.

Operators for callers with gradients off look there for a tape of calls like theirs, and call the
operator of Python's where there is none, which records, and hands tapes over: `ghl_kernels.replay`.
Whether products of float32 may be in TF32 only Python knows: those it plays itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from ghl_kernels import library
from ghl_kernels.tapes import launches
from ghl_kernels.tapes.tape import Allocation, Instruction, Release, Slot, Step, Tape, laid_out

REFUSED = RuntimeError, TypeError, ValueError  # of a value that is no argument of that operator

_owners: dict[int, Any] = {}  # of kernels that tapes launch: as long as this process
_served: set[str] = set()


@functools.cache
def found() -> ModuleType | None:
    return library.extension("_replay")


def unavailable() -> str | None:
    """Why Python plays tapes; None if it does not."""
    built = found()
    if built is None:
        return "not built, or damaged"
    if built.abi != library.ABI or release(built.torch_version) != release(torch.__version__):
        return f"built for torch {built.torch_version}, this is {torch.__version__}"
    return None


def by_whom() -> str:
    """Who plays tapes, and why if it is Python."""
    reason, by = unavailable(), found()
    if reason or by is None:
        return f"Python: {reason}"
    sources = getattr(by, "source_hash", None)  # which earlier versions do not tell
    return "csrc/replay" + (f", {library.OTHERS}" if library.is_of_others(sources) else "")


def release(version: str) -> str:
    """A version of torch without what it was built with, which no header tells."""
    return version.partition("+")[0]


@functools.cache
def module() -> ModuleType | None:
    return None if unavailable() else found()


def serve(name: str, operator: str, device: str, multiplies: bool) -> Any:
    """Have calls of `name` play the tapes of `operator`, for tensors on a kind of device, which is
    called as a dispatch key is; as long as what is returned lives.

    multiplies: whether it has products, which may be TF32 where its tensors are float32.
    """
    by = module()
    if by is None:
        return None
    _served.add(operator)
    return by.serve(name, operator, device, multiplies)


def forgotten() -> int:
    """How many times all tapes have been forgotten."""
    by = module()
    return 0 if by is None else by.forgotten()


def keep(operator: str, arguments: tuple[Any, ...], tape: Tape, note: int, begun: int) -> bool:
    """Have later calls of an operator like one with these arguments played from its tape, if they
    can be; but not where all was forgotten since as much was as `begun` says.

    note: what `last` is to tell. False where there were too many tapes, and now is none.
    """
    by = module()
    if by is None or operator not in _served:
        return True
    kind = by.kind_of(operator, arguments)
    made = None if kind is None else made_of(tape, note)
    return made is None or by.keep(operator, kind, made, begun)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Lets Python see every call, of all threads."""
    by = module()
    if by is None:
        yield
        return
    by.pause(1)
    try:
        yield
    finally:
        by.pause(-1)


def forget() -> None:
    if (by := module()) is not None:
        by.forget()


def last(operator: str) -> tuple[int, int]:
    """How many calls of an operator were played here, and the note of the last one's tape."""
    by = module()
    return (0, 0) if by is None else by.last(operator)


def made_of(tape: Tape, note: int) -> Any:
    """A tape of csrc/replay; None where Python has to play it."""
    by = module()
    if by is None:
        return None
    made = by.Tape(tape.inputs, tape.slots, tape.outputs, note)
    try:
        return made if all(add(made, one) for one in tape.instructions) else None
    except REFUSED:
        return None


def add(made: Any, one: Instruction) -> bool:
    """Add an instruction to a tape of csrc/replay; whether it can be."""
    if isinstance(one, Allocation):
        made.allocate(one.slot, list(one.size), list(one.stride), one.dtype, one.device)
    elif isinstance(one, Release):
        made.release(one.slots)
    elif one.kernel is not None:
        return add_launch(made, one)
    elif (schema := getattr(one.call, "_schema", None)) is None:  # the interpreter's
        return False
    else:
        positional = [given(value) for value in one.arguments]
        named = {name: given(value) for name, value in one.named.items()}
        made.call(schema.name, schema.overload_name, positional, named, one.results)
    return True


def add_launch(made: Any, step: Step) -> bool:
    assert step.kernel is not None
    arguments, slots = laid_out(step)
    plan = None if step.kernel.is_told() or not slots else launches.plan(step.kernel, arguments)
    if plan is None:
        return False
    _owners[id(step.kernel.owner)] = step.kernel.owner
    made.launch(plan[0], slots)
    return True


def given(value: Any) -> tuple[str, Any]:
    """An argument of an operator, as csrc/replay takes it."""
    if isinstance(value, Slot):
        return "slot", value.number
    if isinstance(value, list) and any(isinstance(one, Slot) for one in value):
        if not all(isinstance(one, Slot) for one in value):
            raise TypeError("a list of tensors lacks some")
        return "slots", [one.number for one in value]
    return "value", value
