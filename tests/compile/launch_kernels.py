"""Launches recorded kernels by Triton, by csrc/launches and by csrc/replay, and compares what a
driver is given; run as a program, with the directory of a libcuda without a GPU (`libcuda.cpp`).

Prints a line of JSON for each kernel launched. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
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

from ghl_kernels import dispatch, replay
from ghl_kernels.tapes import launches, player, tape
from ghl_kernels.tapes.launches import ADDRESS, Address, Described, Kernel, TensorMap
from ghl_kernels.tapes.recorder import record
from ghl_kernels.tuning.tiles import Tile

DIRECTORY = Path(sys.argv[1])
plan_in_launches = launches.plan
STREAM = 11  # of a GPU; csrc/replay is told that of a CPU
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

    stream = STREAM

    def get_current_stream(self, device: int) -> int:
        return self.stream

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


def plan(kernel: Kernel, arguments: Sequence[Any]) -> Any:
    """`launches.plan` where the driver knows the parameters of that kernel, if it is one."""
    if kernel.owner is None:
        return plan_in_launches(kernel, arguments)
    expect(parameter_bytes(kernel.owner.asm["cubin"]))
    planned = plan_in_launches(kernel, arguments)
    expect([])  # while others are launched
    return planned


def replayed(step: tape.Step) -> tape.Play:
    """A launch as csrc/replay makes it."""
    arguments, slots = tape.laid_out(step)
    handle, _ = launches.plan(step.kernel, arguments)
    made = player.module().Tape(len(slots), len(slots), [], 0)
    made.launch(handle, [*range(len(slots))])
    return lambda tensors: made.play([tensors[slot] for slot in slots])


def compared(original: Callable[..., tape.Play]) -> Callable[..., tape.Play]:
    """A launcher of tapes whose launches are made by all."""

    def launcher(kernel: Kernel, step: tape.Step, by_triton: tape.Play) -> tape.Play:
        sizes = parameter_bytes(kernel.owner.asm["cubin"])
        again, compiled = original(kernel, step, by_triton), replayed(step)

        def play(tensors: list[Any]) -> None:
            expect(sizes)
            before = len(launched())
            by_triton(tensors)
            again(tensors)
            driver.active.stream = 0
            by_triton(tensors)
            compiled(tensors)
            driver.active.stream = STREAM
            expect([])
            made = launched()[before:]
            line = {
                "kernel": kernel.owner.metadata.name,
                "planned": again is not by_triton,
                "launches": len(made),
                "same": made[0] == made[1] and made[2] == made[3] and len(set(made)) == 2,
                "maps": sum(isinstance(kind, TensorMap) for kind in kernel.kinds),
            }
            print(json.dumps(line), flush=True)

        return play

    return launcher


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


def merges() -> list[tuple[int, int]]:
    """How many launches calls made, and how many of the calls csrc/replay played: the third, not
    the fourth, which has no context, and the fifth."""
    backend = dispatch.Backend("triton", "for a test")
    dispatch.settled = lambda *arguments: backend
    replay.on_gpu = lambda t: True
    torch.cuda.is_current_stream_capturing = lambda: False
    served = player.serve("merge_no_grad", "merge", "CPU", False)
    tensors, found = [torch.ones(size) for size in ((8, 4), (8, 4), (9,), (8, 4))], []
    for has_context in (True, True, True, False, True):
        libcuda.test_set_context(has_context)
        before = len(launched()), player.last("merge")[0]
        torch.ops.ghl_kernels.merge_no_grad(*tensors, "oja", "sign", "absmax")
        found.append((len(launched()) - before[0], player.last("merge")[0] - before[1]))
    del served
    return found


def main() -> None:
    told: list[Any] = []
    driver.set_active(Driver())
    launches.plan = plan
    compile_cases.empty = lambda *shape, dtype=torch.float32: torch.zeros(*shape, dtype=dtype)
    tape.stream_of = lambda t: STREAM
    own, tape.launcher = tape.launcher, compared(tape.launcher)
    for case in CASES:
        with used(case):
            for call, tensors in calls_of(case):
                _, taped = record(call, tensors)
                assert taped is not None, case
                taped.play(tensors)
    tape.launcher = own
    with used(case):
        _, untold = record(call, tensors)
    before = len(launched())
    triton.knobs.runtime.launch_enter_hook.add(told.append)
    untold.play(tensors)
    triton.knobs.runtime.launch_enter_hook.remove(told.append)
    kernels = len(launched()) - before
    last = {"refusals": refusals(), "told": len(told), "kernels of that call": kernels}
    print(json.dumps({**last, "merges": merges()}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
