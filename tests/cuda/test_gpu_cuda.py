"""What only a GPU shows of the compiled kernels: every tile on many seeds, and Hopper's own.

The tests of tests/triton run with `cuda` forced as well where there is a GPU that its library fits.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import Conv, Layer, Linear, assert_pair, problem_of

import ghl_kernels
from ghl_kernels import Rule, dispatch, splits
from ghl_kernels.cuda import kernels
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import Entry

DTYPES = torch.float32, torch.bfloat16, torch.float16
LAYERS: dict[str, Layer] = {
    "linear": Linear(4096, 256, 256),
    "linear_tail": Linear(3001, 261, 131),
    "conv": Conv(8, 64, (16, 16), 128, padding=(1, 1)),
    "conv_tail": Conv(5, 67, (13, 14), 35, (3, 3), (2, 1), (1, 0), (1, 2)),
    "three_channels": Conv(8, 3, (16, 16), 64, padding=(1, 1)),
    "groups": Conv(5, 12, (13, 14), 134, (3, 2), (2, 1), (1, 0), (1, 2), groups=2),
    "groups_of_8": Conv(5, 16, (13, 14), 144, (3, 2), (2, 1), (1, 0), (1, 2), groups=2),
    "depthwise": Conv(5, 67, (13, 14), 134, (7, 7), (2, 1), (3, 2), groups=67),
}


def missing(name: str) -> str | None:
    """Why there is nothing to test here."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    return dispatch.unavailable(name, torch.empty(0, device="cuda"), None)


@pytest.fixture
def on_gpu() -> Iterator[torch.device]:
    if reason := missing("cuda"):
        pytest.skip(reason)
    with torch.device("cuda", torch.cuda.current_device()) as device:
        yield device


OF_SUMS = [name for name in tiles.BY_CUDA if name != kernels.EXCHANGED]  # that have those of u


@pytest.mark.parametrize("strategy", OF_SUMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_every_tile_on_many_seeds(
    name: str, dtype: torch.dtype, strategy: str, on_gpu: torch.device
) -> None:
    """And the same bits twice."""
    layer = LAYERS[name]
    problem = problem_of(layer, dtype)
    if reason := dispatch.unavailable(strategy, torch.empty(0, device="cuda"), problem):
        pytest.skip(reason)
    known = kernels.tiles_for(strategy, problem)
    assert known
    for _, tile in known:
        entry = Entry(tiles.kind(problem), 8 * dtype.itemsize, 1, 1, 1, strategy, tile)
        for seed, competition in enumerate(("softmax", "softhebb", "hard", "linear")):
            torch.manual_seed(seed)
            tensors, rule = layer.tensors(dtype), Rule(competition=competition)
            with tiles.use(entry), ghl_kernels.force(strategy):
                assert_pair(layer, tensors, rule)
                assert all(map(torch.equal, *(layer.pair(tensors, rule) for _ in range(2))))


STRUNG: dict[str, Layer] = {  # of so many rows that parts are less than u
    "linear": Linear(9001, 264, 136),
    "conv": Conv(16, 16, (16, 16), 128, padding=(1, 1)),
    "groups": Conv(64, 32, (13, 14), 128, (3, 2), (2, 1), (1, 0), (1, 2), groups=2),
}


@pytest.mark.parametrize("strategy", [name for name in OF_SUMS if name in tiles.BY_SM90])
@pytest.mark.parametrize("decay", ["oja", "instar"])
@pytest.mark.parametrize("name", STRUNG)
def test_tiles_of_boxes_strung_together(
    name: str, decay: str, strategy: str, on_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU of seven multiprocessors that never divide the tiles evenly; and the same bits
    twice."""
    layer, rule = STRUNG[name], Rule(decay=decay)
    problem = problem_of(layer, torch.bfloat16)
    if reason := dispatch.unavailable(strategy, torch.empty(0, device="cuda"), problem):
        pytest.skip(reason)
    monkeypatch.setattr(splits, "processors", lambda device: 7)
    monkeypatch.setattr(splits, "FEWEST_BLOCKS", 1)
    monkeypatch.setattr(splits, "STRINGING", 0.0)
    strung = 0
    for _, tile in kernels.tiles_for(strategy, problem):
        entry = Entry(tiles.kind(problem), 16, 1, 1, 1, strategy, tile)
        parts, rows = splits.split_rows(problem, tile, on_gpu)
        strung += parts > -(-problem.rows // rows)
        tensors = layer.tensors(torch.bfloat16)
        with tiles.use(entry), ghl_kernels.force(strategy):
            assert_pair(layer, tensors, rule)
            assert all(map(torch.equal, *(layer.pair(tensors, rule) for _ in range(2))))
    assert strung


EXCHANGED: dict[str, Layer] = {
    "linear": Linear(9001, 264, 136),
    "linear_8_neurons": Linear(300, 72, 8),
    "linear_1024_neurons": Linear(20000, 72, 1024),
    "many_rows": Conv(64, 64, (56, 56), 128, (1, 1)),
    "conv": Conv(40, 64, (28, 28), 64, padding=(1, 1)),
    "conv_stride": Conv(40, 128, (27, 28), 520, (1, 1), (2, 2)),
}


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", EXCHANGED)
def test_u_that_blocks_exchange(name: str, dtype: torch.dtype, on_gpu: torch.device) -> None:
    """Of every tile, and the same bits from a graph on another stream, however often."""
    layer, strategy = EXCHANGED[name], kernels.EXCHANGED
    if reason := missing(strategy):
        pytest.skip(reason)
    problem = problem_of(layer, dtype)
    assert dispatch.unavailable(strategy, torch.empty(0, device="cuda"), problem) is None
    tensors = layer.tensors(dtype)
    for _, tile in kernels.tiles_for(strategy, problem):
        entry = Entry(tiles.kind(problem), 16, 1, 1, 1, strategy, tile)
        with tiles.use(entry), ghl_kernels.force(strategy):
            assert_pair(layer, tensors, Rule(tau=0.7), "rows")
            first = layer.pair(tensors, Rule(), "rows")
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                again = layer.pair(tensors, Rule(), "rows")
            for _ in range(20):
                for sums in again:
                    sums.fill_(float("nan"))
                graph.replay()
                assert all(map(torch.equal, first[:2], again[:2]))


def test_a_gpu_that_nothing_was_compiled_for_is_an_error_with_its_cause(
    on_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once said by the dispatcher: kernels are never asked for. The next call is not disturbed."""
    monkeypatch.setattr(dispatch.libraries, "architectures", lambda library: ("3.5",))
    with ghl_kernels.force("cuda"), pytest.raises(RuntimeError, match=r"compiled for 3\.5, none"):
        torch.ops.ghl_kernels.logsumexp(torch.randn(3, 4), 1.0, 1)
    torch.cuda.synchronize()
