"""The clock of a GPU with every call of CUDA made up: that it measures what it says, cold."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from ghl.bench.clock import GpuClock, ceilings, clock_for

CPU = torch.device("cpu")


class Event:
    """Time is the number of calls between two events."""

    log: list[str]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = len(self.log)
        self.log.append("event")

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)


class Stream:
    def __init__(self, *arguments: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


class Graph:
    def replay(self) -> None:
        Event.log.append("replay")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> GpuClock:
    Event.log = []
    fakes = {
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=64),
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph,
        "current_stream": lambda device: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
        "synchronize": lambda *device: None, "empty_cache": lambda: None,
        "_sleep": lambda cycles: Event.log.append("sleep"),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = GpuClock(CPU)
    monkeypatch.setattr(clock, "flush", lambda: Event.log.append("flush"))
    return clock


def test_each_call_is_timed_alone_and_cold(clock: GpuClock) -> None:
    timing = clock.eager(lambda: Event.log.append("call"))
    assert timing.method == "events"
    assert set(timing.times) == {2.0}
    assert Event.log[-4:] == ["flush", "event", "call", "event"]


def test_what_ranks_counts_no_gaps_between_launches(clock: GpuClock) -> None:
    """The GPU sleeps while they are made."""
    assert clock.quick(lambda: Event.log.append("call")) == 2.0
    assert Event.log[:5] == ["flush", "sleep", "event", "call", "event"]


def test_a_graph_is_replayed_not_called(clock: GpuClock) -> None:
    timing = clock.graph(lambda: Event.log.append("call"))
    assert timing is not None
    assert timing.method == "graph"
    assert Event.log.count("call") == 1
    assert Event.log[-4:] == ["flush", "event", "replay", "event"]


def test_what_cannot_be_captured_has_no_graph(clock: GpuClock) -> None:
    def fails() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert clock.graph(fails) is None


def test_warming_up_calls_more_than_once(clock: GpuClock) -> None:
    clock.warm_up(lambda: Event.log.append("call"))
    assert Event.log.count("call") > 1


def test_the_cache_is_filled_by_reading(clock: GpuClock) -> None:
    before = clock.cold.clone()
    GpuClock.flush(clock)
    assert torch.equal(clock.cold, before)
    assert clock.cold.numel() * 4 >= 2**28


def test_ceilings_of_this_machine() -> None:
    found = ceilings(clock_for(CPU), ("float32",))
    assert found.bytes_per_second > 1e8
    assert found.flops_per_second["float32"] > 1e8
    milliseconds, bound = found.floor_ms(0, int(found.bytes_per_second), "float32")
    assert (round(milliseconds), bound) == (1000, "memory")
