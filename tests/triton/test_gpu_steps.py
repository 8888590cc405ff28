"""Steps of training on a GPU: streams, devices, graphs, waits and memory. Tiles and sizes are in
`test_gpu.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Conv, Layer, Linear, Tensors, largest, problem_of, tolerance
from test_gpu import RULE, SIXTEEN_BITS, gpu
from test_merge import sums
from torch import Tensor

import ghl
import ghl_kernels
from ghl_kernels import dispatch
from ghl_kernels.triton import foreach_merge as many
from ghl_kernels.tuning.tiles import BY_SM90

STEPS: dict[str, Layer] = {
    "linear": Linear(20000, 256, 100),
    "long_rows": Linear(5000, 256, 1000),
    "conv": Conv(32, 64, (28, 28), 64, padding=(1, 1)),
    "three_channels": Conv(16, 3, (56, 56), 64, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    "depthwise": Conv(16, 96, (28, 28), 96, padding=(1, 1), groups=96),
}
steps = pytest.mark.parametrize("layer", STEPS.values(), ids=STEPS)


def step(layer: Layer, tensors: Tensors) -> list[Tensor]:
    """The pair, its merge, and a merge of two layers at once."""
    pair = layer.pair(tensors, RULE)
    choices = RULE.decay, RULE.gate, RULE.normalize
    w = tensors[3].float()
    merged = torch.ops.ghl_kernels.merge(*pair, w, *choices)
    twice = [[t, t * 2] for t in (*pair, w)]
    together = torch.ops.ghl_kernels.foreach_merge(*twice, *choices)
    return [*pair, *merged, *(t for results in together for t in results)]


def assert_same(results: Tensors, wanted: Tensors) -> None:
    for number, (actual, expected) in enumerate(zip(results, wanted, strict=True)):
        assert torch.equal(actual, expected), f"result {number} of the step"
        assert actual.stride() == expected.stride(), f"strides of result {number} of the step"


def test_a_step_gives_the_same_bits_twice(fused: None) -> None:
    layer = Linear(40, 5, 6)
    tensors = layer.tensors(torch.float16)
    assert_same(step(layer, tensors), step(layer, tensors))


@gpu
@steps
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_the_same_bits_every_time(
    layer: Layer, dtype: torch.dtype, shipped: None, implementation: str
) -> None:
    """Of our kernels; cuDNN chooses its algorithms."""
    tensors = layer.tensors(dtype)
    if implementation == "library":
        layer.pair(tensors, RULE)
        pytest.skip("the products are a library's")
    once = step(layer, tensors)
    for _ in range(10):
        assert_same(step(layer, tensors), once)


@gpu
@steps
def test_memory_that_held_nan_is_never_read(layer: Layer, shipped: None, fused: None) -> None:
    """Blocks that the allocator hands to the workspace, freed full of NaN before every call."""
    tensors = layer.tensors(torch.float16)
    wanted = step(layer, tensors)
    for numbers in (2**8, 2**14, 2**20, 2**24):
        held = [torch.full((numbers,), float("nan")) for _ in range(8)]
        del held
        assert_same(step(layer, tensors), wanted)


@gpu
@steps
def test_on_a_stream_of_its_own(layer: Layer, shipped: None, fused: None) -> None:
    """The activations are written on that stream, late: a kernel on another would read NaN."""
    tensors = layer.tensors(torch.float16)
    wanted = step(layer, tensors)
    late = [torch.full_like(t, float("nan")) for t in tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for t, values in zip(late, tensors, strict=True):
            t.copy_(values)
        results = step(layer, late)
    stream.synchronize()
    assert_same(results, wanted)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_a_device_that_is_not_the_current_one(shipped: None, fused: None) -> None:
    layer = STEPS["linear"]
    tensors = layer.tensors(torch.float16)
    elsewhere = step(layer, [t.to("cuda:1") for t in tensors])
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in elsewhere)
    for actual, wanted in zip(elsewhere, step(layer, tensors), strict=True):
        torch.testing.assert_close(actual.to(wanted.device), wanted)


@gpu
@steps
def test_a_graph_is_captured_and_replayed(layer: Layer, shipped: None, fused: None) -> None:
    """With other activations in the same memory than it was captured with."""
    tensors = layer.tensors(torch.float16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(layer, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, tensors)
    for seed in (1, 2):
        torch.manual_seed(seed)
        for t, other in zip(tensors, layer.tensors(torch.float16), strict=True):
            t.copy_(other)
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, step(layer, tensors))


@gpu
def test_a_first_call_in_a_capture_leaves_nothing_unfilled(shipped: None, fused: None) -> None:
    """What it kept for later calls was only to be copied at a replay, which may never come."""
    choices = RULE.decay, RULE.gate, RULE.normalize

    def merge_all(layers: list[list[Tensor]]) -> list[Tensor]:
        results = torch.ops.ghl_kernels.foreach_merge(*zip(*layers, strict=True), *choices)
        return [t for one in results for t in one]

    layers = [sums(shape) for shape in ((40, 30), (7, 300), (64, 64))]
    wanted = merge_all(layers)
    torch.cuda.synchronize()
    many.remembered_shares.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = merge_all(layers)
    assert_same(merge_all(layers), wanted)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, wanted)


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[], None]]:
    """From its call on, whatever waits for the GPU is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("preset", ["ghl", "hebb", "sign", "bp"])
def test_a_step_never_waits_for_the_gpu(
    preset: str, shipped: None, no_synchronisation: Callable[[], None]
) -> None:
    """Layers' forward and backward and an optimizer's step, by what the dispatcher chooses."""
    model = torch.nn.Sequential(
        ghl.Conv2d(3, 64, 7, stride=2, padding=3),
        torch.nn.ReLU(),
        ghl.Conv2d(64, 64, 3, padding=1),
        ghl.Conv2d(64, 64, 3, padding=1, groups=64),
        torch.nn.Flatten(),
        ghl.Linear(64 * 16 * 16, 10),
    )
    for layer in model:
        if isinstance(layer, ghl.Linear | ghl.Conv2d):
            layer.rule = preset
    model = model.half().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(64, 3, 32, 32).half().contiguous(memory_format=torch.channels_last)

    def train() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        train()
    no_synchronisation()
    for _ in range(3):
        train()


@gpu
def test_many_layers_are_merged_without_waiting(
    shipped: None, fused: None, no_synchronisation: Callable[[], None]
) -> None:
    layers = [sums((64, 32)) for _ in range(30)]
    choices = RULE.decay, RULE.gate, RULE.normalize
    arguments = [list(one) for one in zip(*layers, strict=True)]
    torch.ops.ghl_kernels.foreach_merge(*arguments, *choices)
    torch.cuda.synchronize()
    no_synchronisation()
    torch.ops.ghl_kernels.foreach_merge(*arguments, *choices)


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that a call held at once beyond what was there before it, its results included.

    As it asked for them: the blocks that an allocator gives for them may be a megabyte larger.
    """
    call()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


@gpu
@steps
def test_the_workspace_is_never_more_than_the_composition_needs(
    layer: Layer, shipped: None, implementation: str
) -> None:
    """Nor than the u that it stores, if u is not stored; row statistics are 12 bytes a row."""
    tensors = layer.tensors(torch.float16)
    if isinstance(layer, Conv):
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    _, y, _, w = tensors
    results = 2 * 4 * w.numel() + 4 * len(w) + 2**12  # and small tables
    with ghl_kernels.force("composed"):
        composed = peak_of(lambda: layer.pair(tensors, RULE))
    peak = peak_of(lambda: layer.pair(tensors, RULE))
    assert peak <= composed + results
    us = {"triton": 1, "cuda": 1, "triton_stored": 2}.get(implementation)
    if us:
        rows = y.numel() // y.shape[1]
        assert peak <= us * y.numel() * y.element_size() + 12 * rows + results


@gpu
@steps
@pytest.mark.parametrize("strategy", BY_SM90)
def test_the_workspace_of_hoppers_own_kernels(
    layer: Layer, strategy: str, shipped: None, forced: Callable
) -> None:
    """No more than the composition needs either."""
    tensors = layer.tensors(torch.float16)
    if isinstance(layer, Conv):
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    reason = dispatch.unavailable(strategy, tensors[0], problem_of(layer, torch.float16))
    if reason:
        pytest.skip(reason)
    w = tensors[3]
    with ghl_kernels.force("composed"):
        composed = peak_of(lambda: layer.pair(tensors, RULE, "rows"))
    with forced(strategy):
        peak = peak_of(lambda: layer.pair(tensors, RULE, "rows"))
    assert peak <= composed + 2 * 4 * w.numel() + 4 * len(w) + 2**12


@gpu
def test_expanded_gradients_of_a_real_loss(shipped: None) -> None:
    """sum().backward() sends stride 0; the update is that of the same numbers written out."""
    layer = ghl.Linear(256, 100).half()
    x = torch.randn(1000, 256).half()
    layer(x).sum().backward()
    expanded = layer.weight.grad.clone()
    layer.zero_grad()
    y = layer(x)
    y.backward(torch.ones_like(y))
    exact = torch.ones(1000, 100).double().T @ x.double()
    sure = exact.abs() > tolerance(exact, exact.half(), largest(exact))
    assert sure.double().mean() > 0.8
    torch.testing.assert_close(expanded[sure], layer.weight.grad[sure])
