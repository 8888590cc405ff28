"""From the third call of a kind on an operator is played, and what a call takes is still told."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import Conv, Layer, Linear, Tensors
from test_gpu import gpu
from test_gpu_steps import assert_same
from test_tape import LAYERS, half, layers
from torch import Tensor

import ghl_kernels
from ghl_kernels import Backend, Rule, dispatch, replay
from ghl_kernels.tapes import player
from ghl_kernels.tapes.recorder import recorder
from ghl_kernels.tuning import trial


@layers
def test_the_third_call_of_a_kind_is_played(layer: Layer, played: dict) -> None:
    for number in range(4):
        tensors = half(layer)
        results = layer.update(tensors, Rule())
        (found,) = played.values()
        assert isinstance(found, Backend if number == 0 else replay.Played)
        played_before = dict(played)
        played.clear()
        assert_same(results, layer.update(tensors, Rule()))  # as called for the first time
        played.clear()
        played.update(played_before)


def test_calls_that_differ_are_not_one_kind(played: dict) -> None:
    layer = LAYERS["conv"]
    x, y, g, w = half(layer)
    kinds = [
        (x, y, g, w), (x, y, g, w.half()), (x.float(), y.float(), g.float(), w),
        (x.contiguous(), y, g, w), (x, y.contiguous(), g, w), (x, y, g, w.contiguous()),
    ]  # fmt: skip
    for tensors in kinds:
        layer.update(tensors, Rule())
    for rule in (Rule("hard"), Rule("linear", decay="none"), Rule(tau=0.5)):
        layer.update(kinds[0], rule)
    layer.pair(kinds[0], Rule())
    dataclasses.replace(layer, padding=(0, 0)).update(
        half(dataclasses.replace(layer, padding=(0, 0))), Rule()
    )
    assert all(isinstance(found, Backend) for found in played.values()) and len(played) == 11
    dispatch.unsettle()
    layer.update(kinds[0], Rule())
    assert len(played) == 12


def test_one_tensor_as_two_arguments(played: dict) -> None:
    """Is no call to record, since others' are two; what was recorded plays for it as well."""
    layer = LAYERS["linear"]
    x, y, g, w = half(layer)
    for _ in range(3):
        twice = layer.update((x, y, y, w), Rule())
    assert [type(found) for found in played.values()] == [Backend]
    layer.update((x, y, g, w), Rule())
    (found,) = played.values()
    assert isinstance(found, replay.Played)
    assert_same(layer.update((x, y, y, w), Rule()), twice)


def test_what_is_forced_is_not_played(played: dict) -> None:
    layer = LAYERS["linear"]
    with ghl_kernels.force("composed"):
        for _ in range(3):
            layer.update(half(layer), Rule())
    assert not played


def test_what_was_forced_meanwhile_is_not_kept(
    played: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread; nor what a trial found no memory for. Calls to come are recorded again,
    but not every one of them."""
    layer, settled = LAYERS["linear"], dispatch.settled
    forced, passing = (
        Backend("composed", "forced"),
        Backend("composed", trial.Passing("too little")),
    )
    for other, left in ((forced, [Backend]), (passing, [])):
        layer.update(half(layer), Rule())
        monkeypatch.setattr(dispatch, "settled", lambda *_, other=other: other)
        layer.update(half(layer), Rule())
        assert [type(found) for found in played.values()] == left
        monkeypatch.setattr(dispatch, "settled", settled)
    for _ in range(3):
        layer.update(half(layer), Rule())
    assert [type(found) for found in played.values()] == [replay.Played]


def test_threads_do_not_take_each_others_choices(
    played: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd has one for every device; another one's call may end between this one's."""
    layer, settled = LAYERS["linear"], dispatch.settled_last

    def meanwhile(operator: str) -> Backend | None:
        elsewhere = threading.Thread(target=dispatch.note, args=(operator, Backend("x", "there")))
        elsewhere.start()
        elsewhere.join()
        return settled(operator)

    monkeypatch.setattr(dispatch, "settled_last", meanwhile)
    for _ in range(3):
        layer.update(half(layer), Rule())
    ((_, backend),) = played.values()
    assert backend.reason != "there"


def test_an_error_is_told_each_time(played: dict) -> None:
    x, y, g, w = half(LAYERS["linear"])
    for _ in range(4):
        with pytest.raises(ValueError, match="g has shape"):
            LAYERS["linear"].update((x, y, g[1:], w), Rule())
        with pytest.raises(TypeError, match="g has layout"):
            LAYERS["linear"].update((x, y, g.to_sparse(), w), Rule())
    assert recorder() is None


def test_the_implementation_that_ran_is_told(played: dict) -> None:
    layer = LAYERS["linear"]
    for _ in range(3):
        layer.update(half(layer), Rule())
    ran = ghl_kernels.last("linear_update")
    layer.update(half(dataclasses.replace(layer, rows=0)), Rule())
    layer.update(half(layer), Rule())
    assert ghl_kernels.last("linear_update") is ran


def test_tapes_are_not_collected_without_end(played: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_TAPES", 3)
    for rows in range(1, 8):
        LAYERS["linear"].update(half(Linear(rows, 5, 4)), Rule())
    assert len(played) <= 3


def test_threads_play_one_tape_beside_each_other(played: dict) -> None:
    layer = LAYERS["conv"]
    mine = [half(layer) for _ in range(4)]
    wanted = [layer.update(tensors, Rule()) for tensors in mine]

    def work(number: int) -> list:
        return [layer.update(mine[number], Rule()) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for results, expected in zip(pool.map(work, range(4)), wanted, strict=True):
            for result in results:
                assert_same(result, expected)


@gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["python", "csrc/replay"])
def test_calls_are_played_on_any_stream_and_in_a_graph(shipped: None, compiled: bool) -> None:
    """Of a step of training: a pair and its merge, by the kernels that users get."""
    if compiled and player.module() is None:
        pytest.skip(f"csrc/replay: {player.unavailable()}")
    layer = Conv(16, 64, (28, 28), 64, padding=(1, 1))
    choice = "oja", "sign", "absmax"
    suffix = "_no_grad" if compiled else ""
    make, merge = (getattr(torch.ops.ghl_kernels, n + suffix) for n in ("conv2d_pair", "merge"))

    def step(tensors: Tensors) -> list[Tensor]:
        pair = make(*tensors, *layer.geometry, "softmax", 1.0)
        return [*pair, *merge(*pair, tensors[3], *choice)]

    def played() -> int:
        return player.last("conv2d_pair")[0] + player.last("merge")[0]

    tensors = half(layer)
    wanted = step(tensors)
    step(half(layer))
    kinds = [found for found in replay._tapes.values() if isinstance(found, replay.Played)]
    assert len(kinds) >= 2
    before = played()
    assert_same(step(tensors), wanted)
    assert played() == before + (2 if compiled else 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_same(step(tensors), wanted)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors)
    for seed in range(3):
        torch.manual_seed(seed)
        for old, new in zip(tensors, half(layer), strict=True):
            old.copy_(new)
        graph.replay()
        assert_same(captured, step(tensors))
