"""Kernels that only stream memory, as shares of the copy bandwidth of the device.

The log-sum-exp of a large y, and the merge of many large layers.
"""

from __future__ import annotations

from typing import Any

import torch

import ghl_kernels
from ghl.bench.clock import Call, Ceilings, Clock
from ghl_kernels import dispatch

DEFINITIONS = {
    "logsumexp": "bytes of y and of the result, over the time, over the measured copy bandwidth",
    "merge": "the same of G, H0 and w, read twice, and the update: the two passes, nothing in L2",
}
IMPLEMENTATIONS = "triton", "cuda"
ROWS, NEURONS = 2**18, 1024
LAYERS, SIDE = 8, 4096


def logsumexp(device: torch.device, rows: int, neurons: int) -> tuple[Call, int]:
    """The call and the bytes that it has to move."""
    y = torch.randn(rows, neurons, dtype=torch.bfloat16, device=device)
    return lambda: torch.ops.ghl_kernels.logsumexp(y, 1.0, 1), 2 * y.numel() + 4 * rows


def merge(device: torch.device, layers: int, side: int) -> tuple[Call, int]:
    """The call and the bytes that its two passes have to move."""
    lists: Any = [[torch.randn(side, side, device=device) for _ in range(layers)] for _ in range(3)]
    totals = [torch.ones(side + 1, device=device) for _ in range(layers)]
    G, H0, w = lists

    def call() -> object:
        return torch.ops.ghl_kernels.foreach_merge(G, H0, totals, w, "oja", "sign", "absmax")

    return call, 7 * 4 * layers * side * side


def shares(
    clock: Clock,
    ceilings: Ceilings,
    names: tuple[str, ...] = IMPLEMENTATIONS,
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((ROWS, NEURONS), (LAYERS, SIDE)),
) -> dict[str, float | str]:
    """Of each implementation that runs here its share, or why a call of it failed."""
    found: dict[str, float | str] = {}
    some = torch.empty(0, device=clock.device)
    for what, make, size in zip(("logsumexp", "merge"), (logsumexp, merge), sizes, strict=True):
        call, moved = make(clock.device, *size)
        for name in names:
            if dispatch.unavailable(name, some, None):
                continue
            try:
                with ghl_kernels.force(name):
                    clock.warm_up(call)
                    seconds = clock.eager(call).p50 / 1e3
                found[f"{what}_{name}"] = moved / seconds / ceilings.bytes_per_second
            except RuntimeError as error:
                found[f"{what}_{name}"] = f"{error}".splitlines()[0][:200]
        del call
        clock.release()
    return found
