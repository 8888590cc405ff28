"""Launches of kernels that Triton compiled, made by csrc/launches: for a tape, which knows all of a
launch but the addresses of its tensors.

Not for: launches that need more than a grid (clusters, scratch memory), or that somebody is told
of. Triton makes these, and all where the library was not built.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ghl_kernels import library

MOST_RANK = 5
SCRATCH = 2  # addresses of memory that a kernel may ask for, which Triton appends
NUMBER, ADDRESS, TENSOR_MAP = range(3)
UNAVAILABLE = -1


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """How a kernel wants a tensor descriptor encoded; `box` from the outermost dimension on."""

    data_type: int
    element_bytes: int
    swizzle: int
    box: tuple[int, ...]


Launch = Callable[[int, Sequence[int]], bool]

# of a parameter: how `struct` packs a number, ADDRESS, a TensorMap, or None if it is compiled in
Kind = str | int | TensorMap | None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel and its grid.

    owner: what must live for `function` to be one. is_told: whether somebody wants to be told of
    launches now.
    """

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    kinds: tuple[Kind, ...]
    owner: Any
    is_told: Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Address:
    """So many bytes behind the first number of a tensor, which has a slot of a tape or, for
    `planned`, a number among those of a call."""

    slot: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Described:
    """What lies at an address; shape and strides in numbers, from the outermost dimension on."""

    base: Address
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nan_outside: bool


class Parameter(ctypes.Structure):
    """GhlParameter of csrc/launches/launches.cpp."""

    _fields_ = [
        ("kind", ctypes.c_int32), ("tensor", ctypes.c_int32), ("offset", ctypes.c_int64),
        ("bytes", ctypes.c_int32), ("number", ctypes.c_uint8 * 8),
        ("data_type", ctypes.c_int32), ("rank", ctypes.c_int32), ("swizzle", ctypes.c_int32),
        ("fill", ctypes.c_int32), ("shape", ctypes.c_uint64 * MOST_RANK),
        ("strides", ctypes.c_uint64 * MOST_RANK), ("box", ctypes.c_uint32 * MOST_RANK),
    ]  # fmt: skip


class Plan(ctypes.Structure):
    """GhlLaunch of csrc/launches/launches.cpp."""

    _fields_ = [
        ("function", ctypes.c_void_p), ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32), ("shared_bytes", ctypes.c_uint32),
        ("parameters", ctypes.c_int32),
    ]  # fmt: skip


@functools.cache
def compiled() -> Any:
    """The library of launches; None where it was not built, or for another version."""
    path = library.DIRECTORY / "libghl_kernels_launches.so"
    try:
        if not path.exists() or library.damage(path) is not None:
            return None
        found = ctypes.CDLL(str(path))
    except OSError:
        return None
    if found.ghl_launches_abi() != library.ABI:
        return None
    found.ghl_launch_plan.restype = ctypes.c_void_p
    found.ghl_launch_forget.argtypes = [ctypes.c_void_p]
    found.ghl_launch_play.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    found.ghl_launch_error.restype = ctypes.c_char_p
    return found


def number(code: str, value: Any) -> Parameter:
    packed = struct.pack(code, value)
    parameter = Parameter(kind=NUMBER, bytes=len(packed))
    ctypes.memmove(parameter.number, packed, len(packed))
    return parameter


def address(at: Address) -> Parameter:
    return Parameter(kind=ADDRESS, tensor=at.slot, offset=at.offset)


def tensor_map(how: TensorMap, what: Described) -> list[Parameter]:
    """The map, and the shape and strides that follow it. A kernel's dimensions begin with the
    outermost, the driver's with the innermost, whose stride it is not told."""
    size, rank = how.element_bytes, len(what.shape)
    parameter = Parameter(
        kind=TENSOR_MAP, tensor=what.base.slot, offset=what.base.offset, data_type=how.data_type,
        rank=rank, swizzle=how.swizzle, fill=int(what.nan_outside),
    )  # fmt: skip
    strides = [size * stride for stride in what.strides[-2::-1]]
    parameter.shape[:rank] = what.shape[::-1]
    parameter.strides[:rank] = [*strides, what.shape[0] * (strides[-1] if strides else size)]
    parameter.box[:rank] = how.box[::-1]
    return [
        parameter,
        *(number("i", n) for n in what.shape),
        *(number("q", n) for n in what.strides),
    ]


def parameters(kernel: Kernel, arguments: Sequence[Any]) -> list[Parameter]:
    """Of a launch with these arguments: Address and Described for tensors, numbers for others."""
    found: list[Parameter] = []
    for kind, value in zip(kernel.kinds, arguments, strict=True):
        if isinstance(kind, TensorMap):
            found += tensor_map(kind, value)
        elif isinstance(kind, str):
            found.append(number(kind, value))
        elif kind == ADDRESS:
            found.append(address(value))
    return [*found, *(number("Q", 0) for _ in range(SCRATCH))]


def plan(kernel: Kernel, arguments: Sequence[Any]) -> tuple[int, int] | None:
    """A launch as the library has it, to be given back to ghl_launch_forget; and how many tensors
    a call must have. None where it can only be made by Triton."""
    by = compiled()
    if by is None:
        return None
    try:
        values = parameters(kernel, arguments)
    except (struct.error, ValueError):  # beyond a parameter's dtype, or a tensor map's dimensions
        return None
    one = Plan(kernel.function, kernel.grid, kernel.threads, kernel.shared_bytes, len(values))
    handle = by.ghl_launch_plan(ctypes.byref(one), (Parameter * len(values))(*values))
    return None if handle is None else (handle, tensors_of(values))


def planned(kernel: Kernel, arguments: Sequence[Any]) -> Launch | None:
    """The launch as a function of a stream and the addresses of a call's tensors, which tells
    whether it was made. None where it can only be made by Triton.

    Raises RuntimeError with the driver's error.
    """
    made = plan(kernel, arguments)
    if made is None:
        return None
    by, (handle, tensors) = compiled(), made

    def launch(stream: int, addresses: Sequence[int]) -> bool:
        error = play(handle, stream, pointers(*addresses))
        if error > 0:
            text = by.ghl_launch_error(error).decode()
            # which keeps the kernel, and what owns its function, as long as this can be called
            raise RuntimeError(
                f"launching a kernel again on a grid of {kernel.grid} failed: {text}"
            )
        return error != UNAVAILABLE

    play, pointers = by.ghl_launch_play, ctypes.c_uint64 * tensors
    weakref.finalize(launch, by.ghl_launch_forget, handle).atexit = False
    return launch


def tensors_of(values: Sequence[Parameter]) -> int:
    """How many tensors a call must have."""
    return max((v.tensor + 1 for v in values if v.kind != NUMBER), default=0)
