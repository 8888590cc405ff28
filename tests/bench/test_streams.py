"""The shares of kernels that only stream memory: what is timed, and what they are shares of."""

from __future__ import annotations

import pytest
import torch

import ghl_kernels
from ghl.bench import streams
from ghl.bench.clock import Call, Ceilings, Timing, WallClock

CPU = torch.device("cpu")


class Seconds(WallClock):
    """Every call takes a second."""

    def eager(self, call: Call) -> Timing:
        call()
        return Timing("fake", (1000.0,))


def test_bytes_over_time_over_bandwidth() -> None:
    ceilings = Ceilings(1000.0, {})
    found = streams.shares(Seconds(CPU), ceilings, ("composed",), ((10, 20), (2, 5)))
    y = 2 * 10 * 20 + 4 * 10
    merges = 2 * 4 * 5 * 5 * 7
    assert found == {"logsumexp_composed": y / 1000, "merge_composed": merges / 1000}
    assert ghl_kernels.last("foreach_merge") == ghl_kernels.Backend("composed", "forced")


def test_what_fails_says_so_and_what_does_not_run_here_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(ghl_kernels.composed, "logsumexp", fail)
    monkeypatch.setattr(ghl_kernels.dispatch, "cuda_unavailable", lambda *arguments: "no GPU")
    found = streams.shares(Seconds(CPU), Ceilings(1.0, {}), ("cuda", "composed"), ((3, 4), (1, 2)))
    assert found.pop("logsumexp_composed") == "no kernel image"
    assert list(found) == ["merge_composed"]
