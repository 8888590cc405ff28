"""Launches recorded kernels twice, by Triton and by csrc/launches, and compares what a driver is
given; run as a program, with the directory of a libcuda without a GPU (`libcuda.cpp`).

Prints a line of JSON for each kernel launched. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compile_cases
import torch
import triton
from compile_cases import Case, calls_of, used
from compile_kernels import tool
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime.driver import driver

from ghl_kernels import launches, tape
from ghl_kernels.launches import ADDRESS, Address, Described, Kernel, TensorMap
from ghl_kernels.recorder import record
from ghl_kernels.tiles import Tile

DIRECTORY = Path(sys.argv[1])
STREAM = 11
CASES = [
    Case(90, "pointwise", 16, Tile(64, 64, 64, 4, 3, descriptors=True, programs=3), "in_tile"),
    Case(90, "pointwise", 16, Tile(64, 64, 64, 4, 3, descriptors=True, programs=3), "statistics"),
    Case(90, "conv", 16, Tile(64, 64, 64, 4, 3, programs=3), "stored", aligned=False),
    Case(90, "packed", 16, Tile(64, 64, 64, 8, 3, packed=True), "in_tile", sum_u=True),
    Case(90, "depthwise", 16, Tile(4, 64, 16, 4, 2), "statistics"),
    Case(90, "pointwise", 16, Tile(64, 64, 64, 4, 3, programs=8), "rest"),
]


os.environ["TRITON_LIBCUDA_PATH"] = str(DIRECTORY)  # read when Triton compiles its launcher
libcuda = ctypes.CDLL(str(DIRECTORY / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)


class Driver(CudaDriver):
    """Triton's own, without torch's view of a GPU."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.get_device_capability = lambda device: (9, 0)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def parameter_bytes(cubin: bytes) -> list[int]:
    """The sizes of a kernel's parameters, as its code says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        info = tool("cuobjdump", "-elf", file.name)
    found = re.findall(r"Ordinal : 0x([0-9a-f]+)\s+Offset\s*: 0x\w+\s+Size\s*: 0x([0-9a-f]+)", info)
    sizes = {int(ordinal, 16): int(size, 16) for ordinal, size in found}
    assert sizes, info[:2000]
    return [sizes[i] for i in range(len(sizes))]


def expect(sizes: Sequence[int]) -> None:
    libcuda.test_set_sizes((ctypes.c_size_t * len(sizes))(*sizes), len(sizes))


def launched() -> list[bytes]:
    """What every launch so far was given."""
    room = ctypes.create_string_buffer(1 << 14)
    sizes = [libcuda.test_launch(i, room, len(room)) for i in range(libcuda.test_launches())]
    return [
        room.raw[:size]
        for i, size in enumerate(sizes)
        if libcuda.test_launch(i, room, len(room)) == size
    ]


def compare() -> None:
    """Have every launch that a tape plays made by both."""
    original = tape.launcher

    def both(kernel: Kernel, step: tape.Step, by_triton: tape.Play) -> tape.Play:
        sizes = parameter_bytes(kernel.owner.asm["cubin"])
        expect(sizes)
        again = original(kernel, step, by_triton)
        expect([])  # while others are launched

        def play(tensors: list[Any]) -> None:
            expect(sizes)
            before = len(launched())
            by_triton(tensors)
            again(tensors)
            expect([])
            made = launched()[before:]
            line = {
                "kernel": kernel.owner.metadata.name,
                "planned": again is not by_triton,
                "launches": len(made),
                "same": len(set(made)) == 1,
                "maps": sum(isinstance(kind, TensorMap) for kind in kernel.kinds),
            }
            print(json.dumps(line), flush=True)

        return play

    tape.launcher = both


def refusals() -> dict[str, Any]:
    """What is said where a launch cannot be made, or must not."""
    kernel = Kernel(1, (2, 1, 1), 32, 0, (ADDRESS, "i"), None, lambda: False)
    arguments, found = (Address(0, 4), 5), {}
    expect([8, 4, 8, 8])
    launch = launches.planned(kernel, arguments)
    found["made"] = launch(STREAM, [64])
    libcuda.test_set_context(False)
    found["without a context"] = launch(STREAM, [64])
    libcuda.test_set_context(True)
    for name, sizes in (("size", [8, 8, 8, 8]), ("fewer", [8, 4, 8]), ("more", [8, 4, 8, 8, 8])):
        expect(sizes)
        found[f"another kernel: {name}"] = launches.planned(kernel, arguments) is not None
    line = Kernel(1, (2, 1, 1), 32, 0, (TensorMap(9, 2, 0, (64,)),), None, lambda: False)
    expect([128, 4, 8, 8, 8])
    try:
        launches.planned(line, [Described(Address(0, 0), (64,), (1,), False)])(STREAM, [64])
    except RuntimeError as error:
        found["an error of the driver"] = str(error)
    return found


def main() -> None:
    told: list[Any] = []
    driver.set_active(Driver())
    compile_cases.empty = lambda *shape, dtype=torch.float32: torch.zeros(*shape, dtype=dtype)
    tape.stream_of = lambda t: STREAM
    compare()
    for case in CASES:
        with used(case):
            for call, tensors in calls_of(case):
                _, taped = record(call, tensors)
                assert taped is not None, case
                taped.play(tensors)
    before = len(launched())
    hook = told.append
    triton.knobs.runtime.launch_enter_hook.add(hook)
    taped.play(tensors)
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    kernels = (len(launched()) - before) // 2
    libcuda.test_set_context(False)  # ours cannot then: by Triton again
    taped.play(tensors)
    libcuda.test_set_context(True)
    last = {"refusals": refusals(), "told": len(told), "kernels of that call": kernels}
    print(json.dumps(last), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
