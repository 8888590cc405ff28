"""How long a call takes on a device, cold, and the two ceilings of that device.

A GPU is timed by events around each call, and by replays of a captured graph where gaps between
launches would count; the L2 cache is emptied before each. A CPU is timed by the wall clock.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Call = Callable[[], object]

SECONDS_PER_ROW = 0.03
REPETITIONS = 20, 50
FEWEST, LONGEST_SECONDS = 5, 0.6  # of a call that takes long
GRAPH_BELOW_MS = 2.0
LAUNCH_CYCLES = 2_000_000  # about a millisecond: a call from Python launches its kernels in less
# what was seen on such GPUs before: bytes/s of a copy, FLOP/s of a bfloat16 product of 8192³
SEEN = {"NVIDIA H200": (4.3e12, 788e12), "NVIDIA H100 80GB HBM3": (3.0e12, 798e12)}
MODES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of each repetition, sorted. method: `events`, `graph` or `wall clock`."""

    method: str
    times: tuple[float, ...]

    def percentile(self, share: float) -> float:
        return self.times[round(share * (len(self.times) - 1))]

    @property
    def p50(self) -> float:
        return self.percentile(0.5)


def repetitions(once_ms: float) -> int:
    """As many as take SECONDS_PER_ROW, within REPETITIONS; fewer only where that takes long."""
    least, most = REPETITIONS
    wanted = round(min(max(SECONDS_PER_ROW * 1e3 / max(once_ms, 1e-3), least), most))
    return max(FEWEST, min(wanted, round(LONGEST_SECONDS * 1e3 / max(once_ms, 1e-3))))


class WallClock:
    """Times a call on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def warm_up(self, call: Call) -> None:
        call()

    def eager(self, call: Call) -> Timing:
        def once() -> float:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3

        first = once()
        times = [once() for _ in range(repetitions(first))]
        return Timing("wall clock", tuple(sorted(times)))

    def quick(self, call: Call) -> float:
        """Milliseconds to rank by."""
        return self.eager(call).p50

    def graph(self, call: Call) -> Timing | None:
        """None: a CPU has no graphs."""
        return None

    def release(self) -> None:
        """Nothing is kept between layers."""


class GpuClock:
    """Times a call on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.cold = torch.zeros(max(4 * l2, 2**28) // 4, dtype=torch.float32, device=device)

    def warm_up(self, call: Call) -> None:
        """On a stream of its own, as a later capture wants it."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Fill the L2 cache with clean lines: written ones would be written back at our cost."""
        self.cold.sum()

    def repeat(self, call: Call, count: int, ahead: bool = False) -> list[float]:
        """`ahead`: the GPU sleeps until all of a call is launched, so that gaps do not count."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            self.flush()
            if ahead:
                torch.cuda._sleep(LAUNCH_CYCLES)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return sorted(start.elapsed_time(end) for start, end in events)

    def eager(self, call: Call) -> Timing:
        return Timing("events", tuple(self.repeat(call, repetitions(self.quick(call)))))

    def quick(self, call: Call) -> float:
        """Milliseconds to rank by, and to choose the number of repetitions."""
        return self.repeat(call, 3, ahead=True)[1]

    def graph(self, call: Call) -> Timing | None:
        """Of replays of the call in a graph; None if it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            return None
        graph.replay()
        count = repetitions(self.quick(graph.replay))
        return Timing("graph", tuple(self.repeat(graph.replay, count)))

    def release(self) -> None:
        """Give the memory of a layer back before the next one."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


Clock = WallClock | GpuClock


def clock_for(device: torch.device) -> Clock:
    return GpuClock(device) if device.type == "cuda" else WallClock(device)


@contextmanager
def precision(mode: str) -> Iterator[None]:
    """TF32 in every float32 product for mode `tf32`, in none for `float32`; else as it is.

    By the older of PyTorch's two ways to say it: torch.compile still reads that one, and raises
    where only the newer was set.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        if mode != "bfloat16":
            matmul.allow_tf32 = cudnn.allow_tf32 = mode == "tf32"
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured: bytes/s of a copy, read and written, and FLOP/s of a large product by mode."""

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def floor_ms(self, flops: int, moved: int, mode: str) -> tuple[float, str]:
        """What no version can beat, and whether `memory` or `compute` sets it."""
        memory, compute = moved / self.bytes_per_second, flops / self.flops_per_second[mode]
        return max(memory, compute) * 1e3, "memory" if memory > compute else "compute"


def copy_rate(clock: Clock, size: int) -> float:
    """Bytes/s of a copy of `size` bytes, read and written."""
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    clock.warm_up(lambda: target.copy_(source))
    return 2 * size / clock.eager(lambda: target.copy_(source)).p50 * 1e3


def product_rate(clock: Clock, side: int, mode: str) -> float:
    """FLOP/s of a product of random matrices: of zeros it would be faster."""
    a, b = torch.randn(2, side, side, device=clock.device).to(MODES[mode])
    with precision(mode):
        clock.warm_up(lambda: a @ b)
        return 2 * side**3 / clock.eager(lambda: a @ b).p50 * 1e3


def ceilings(clock: Clock, modes: tuple[str, ...] = tuple(MODES)) -> Ceilings:
    """Measure a large copy and large products on the device of the clock."""
    on_gpu = clock.device.type == "cuda"
    copied = copy_rate(clock, 2**32 if on_gpu else 2**24)
    rates = {}
    for mode in modes:
        on_tensor_cores = 8192 if mode == "bfloat16" else 4096
        rates[mode] = product_rate(clock, on_tensor_cores if on_gpu else 256, mode)
    clock.release()
    return Ceilings(copied, rates)
