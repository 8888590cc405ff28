"""What the seam refuses before a kernel could read or write where it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("emulated")
ROWS, CHANNELS, NEURONS = 40, 8, 16


def arguments(**changes: object) -> dict[str, Any]:
    """A right call of pair.cuda on a linear layer, with some arguments changed."""
    half = {"dtype": torch.float16}
    right: dict[str, Any] = {
        "x": torch.randn(ROWS, CHANNELS, 1, 1).half(),
        "y": torch.randn(ROWS, NEURONS).half(),
        "g": torch.randn(ROWS, NEURONS, **half),
        "largest": None, "inverse": None, "winner": None,
        "G": torch.empty(NEURONS, CHANNELS), "H0": torch.empty(NEURONS, CHANNELS),
        "u_sums": None, "kernel_size": [1, 1], "stride": [1, 1], "padding": [0, 0],
        "dilation": [1, 1], "out_size": [1, 1], "groups": 1, "competition": 0, "tau": 1.0,
        "channels_last": False, "tf32": True, "splits": 1, "rows_per_split": 64, "tile": 0,
        "sm90": False, "exchange": None,
    }  # fmt: skip
    return right | changes


def test_a_right_call() -> None:
    call = arguments()
    torch.ops.ghl_kernels.pair.cuda(**call)
    torch.testing.assert_close(call["G"], call["g"].float().T @ call["x"].float().flatten(1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"G": torch.empty(NEURONS, CHANNELS - 1)}, "has 112 elements, needs 128"),
        ({"H0": torch.empty(NEURONS, CHANNELS).half()}, "has the wrong dtype"),
        ({"G": torch.empty(NEURONS, 2 * CHANNELS)[:, ::2]}, "has gaps"),
        ({"u_sums": torch.empty(NEURONS - 1)}, "has 15 elements, needs 16"),
        ({"y": torch.randn(ROWS - 1, NEURONS).half()}, "must be matrices of 40 rows"),
        ({"g": torch.randn(ROWS, NEURONS)}, "x, y, g differ in dtype"),
        ({"x": torch.randn(ROWS, CHANNELS, 1, 1, dtype=torch.float64)}, "dtype must be float32"),
        ({"groups": 3}, "groups do not divide"),
        ({"kernel_size": [2, 1]}, "the kernel reaches beyond x"),
        ({"out_size": [2, 1]}, "the kernel reaches beyond x"),
        ({"stride": [1]}, "must be pairs"),
        ({"stride": [0, 1]}, "too small"),
        ({"rows_per_split": 40}, "must be a multiple of 32"),
        ({"rows_per_split": 32}, "1 splits of 32 rows do not cover 40"),
        ({"splits": 2}, "2 splits of 64 rows do not cover 40"),
        ({"tile": 99}, "not compiled for the dtype"),
        ({"sm90": True}, "not compiled for the dtype"),
        ({"exchange": torch.empty(9, dtype=torch.uint8)}, "this tile exchanges nothing"),
        ({"largest": torch.empty(ROWS)}, "inverse is absent"),
        ({"largest": torch.empty(ROWS), "inverse": torch.empty(ROWS - 1)}, "has 39 elements"),
        (
            {"largest": torch.empty(ROWS + 1)[1:], "inverse": torch.empty(ROWS)},
            "multiples of 16 bytes",
        ),
        (
            {"largest": torch.empty(ROWS), "inverse": torch.empty(ROWS), "competition": 2},
            "winner is absent",
        ),
    ],
)
def test_a_wrong_call_of_a_pair(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.ghl_kernels.pair.cuda(**arguments(**changes))


def test_statistics_are_needed_where_rows_are_not_whole() -> None:
    y = torch.randn(ROWS, 72).half()
    sums = torch.empty(72, CHANNELS), torch.empty(72, CHANNELS)
    with pytest.raises(RuntimeError, match="largest is absent"):
        torch.ops.ghl_kernels.pair.cuda(**arguments(y=y, g=y, G=sums[0], H0=sums[1]))


def test_wrong_calls_of_the_others() -> None:
    ops, y = torch.ops.ghl_kernels, torch.randn(4, 5, 1, 1)
    with pytest.raises(RuntimeError, match="needs 4"):
        ops.logsumexp.cuda(y, torch.empty(3), 1.0)
    with pytest.raises(RuntimeError, match=r"must be \(outer, neurons, inner, 1\)"):
        ops.statistics.cuda(y[:, :, 0], torch.empty(4), torch.empty(4), None, 0, 1.0)
    G = torch.empty(3, 2)
    with pytest.raises(RuntimeError, match="has 6 elements, needs 12"):
        ops.sum_splits.cuda(G, torch.empty(12), None, G.clone(), G.clone(), None, 2)
    with pytest.raises(RuntimeError, match="come together"):
        ops.sum_splits.cuda(G, G, torch.empty(3), G.clone(), G.clone(), None, 1)
    neurons, layer, scratch = torch.empty(3, 3), torch.empty(3), torch.empty(2, 3)
    one = [[G], [G], [torch.empty(4)], [G], [G.clone()], [neurons], [layer], [scratch]]
    with pytest.raises(RuntimeError, match="differ in length"):
        ops.foreach_merge.cuda(*one[:3], [G, G], *one[4:], 0, 0, 0)
    with pytest.raises(RuntimeError, match="has 3 elements, needs 4"):
        ops.foreach_merge.cuda(*one[:2], [torch.empty(3)], *one[3:], 0, 0, 0)
    with pytest.raises(RuntimeError, match="a weight is empty"):
        ops.foreach_merge.cuda(*one[:3], [torch.empty(0, 2)], *one[4:], 0, 0, 0)
