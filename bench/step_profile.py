"""What of a step is the GPU's: the time of its kernels, by torch.profiler."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 3
LONGEST = 30  # kernels that are named
NAME = 100  # characters of a kernel's name


def of_gpu(step: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of all kernels and copies of a step, their number, and the longest of them by
    name: {kernel, ms, launches}. Means over a few steps."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    return summary(found.events())


def summary(events: Iterable[Any]) -> dict[str, Any]:
    """Of the events of so many steps."""
    us: dict[str, float] = collections.Counter()
    launches: dict[str, int] = collections.Counter()
    for event in events:
        if event.device_type.name == "CUDA":
            us[event.name[:NAME]] += event.self_device_time_total
            launches[event.name[:NAME]] += 1
    longest = sorted(us, key=us.__getitem__, reverse=True)[:LONGEST]
    return {
        "gpu_ms": sum(us.values()) / 1e3 / STEPS,
        "gpu_launches": sum(launches.values()) / STEPS,
        "gpu_kernels": [
            {"kernel": name, "ms": us[name] / 1e3 / STEPS, "launches": launches[name] / STEPS}
            for name in longest
        ],
    }
