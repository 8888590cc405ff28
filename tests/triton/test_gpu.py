"""What only a GPU shows: the shipped tiles as compiled, streams, graphs, memory, huge layers.

Tests without the mark `gpu` run the helpers of this file where there is none.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import small_tiles
import torch
from cases import Conv, Layer, Linear, Tensors, assert_pair, largest, tolerance, wide
from test_merge import sums
from torch import Tensor

import ghl
import ghl_kernels
from ghl_kernels import Problem, Rule
from ghl_kernels.triton import foreach_merge as many
from ghl_kernels.triton import split_k, tiles
from ghl_kernels.triton.tiles import Entry, Table

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
RULE = Rule()
BY_TRITON = ("triton", "triton_stored")
OWN = {name: getattr(tiles, name) for name in ("table", "nearest")}
own_split_rows = split_k.split_rows  # these before fixtures replace them


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables and the splits that users have."""
    for name, function in OWN.items():
        monkeypatch.setattr(tiles, name, function)
    monkeypatch.setattr(split_k, "split_rows", own_split_rows)


def layers_for(entry: Entry) -> list[Layer]:
    """Of the entry's kind: one that its tiles divide, and one with a tail in every dimension."""
    n, columns = entry.neurons, entry.columns
    if entry.kind == "pointwise":
        return [Linear(4096, columns, n), Linear(3001, columns + 5, n + 3)]
    if entry.kind == "conv":
        c = max(16, min(columns // 9, 256))
        tail = Conv(5, c + 3, (13, 14), n + 3, (3, 3), (2, 1), (1, 0), (1, 2))
        return [Conv(8, c, (16, 16), n, padding=(1, 1)), tail]
    if entry.kind == "packed":
        return [
            Conv(8, 3, (16, 16), n, padding=(1, 1)),
            Conv(5, 12, (13, 14), 2 * n + 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2),
        ]
    return [
        Conv(8, 64, (16, 16), 64, padding=(1, 1), groups=64),
        Conv(5, 67, (13, 14), 134, (7, 7), (2, 1), (3, 2), groups=67),
    ]


def entries_of(table: Table) -> list[Entry]:
    """One for each different tile of a kind that Triton's own products use."""
    own = [e for e in table.entries if e.strategy in BY_TRITON]
    return list({(e.kind, e.bits, e.strategy, e.tile): e for e in own}.values())


def problem_of(layer: Layer, dtype: torch.dtype) -> Problem:
    x, y, g, w = layer.tensors(dtype)
    if isinstance(layer, Linear):
        return Problem.of_linear(x, w)
    return Problem.of_conv2d(x, y, g, w, *layer.geometry)


def in_parts(layer: Layer, tensors: Tensors, rule: Rule, parts: int) -> tuple[Tensor, ...]:
    """G, H0 and the magnitudes of the terms of both, in float64 over one part of the batch after
    another."""
    x, y, g, w = tensors
    totals: list[Tensor] = []
    for batch in torch.arange(x.shape[0], device="cpu").tensor_split(parts):
        part = [t[int(batch[0]) : int(batch[-1]) + 1].double() for t in (x, y, g)]
        exact = layer.reference((*part, w.double()), rule)
        u = ghl_kernels.reference.compete(part[1], rule)
        linear = Rule(competition="linear")
        size = layer.reference((part[0].abs(), u.abs(), part[2].abs(), w.double()), linear)
        terms = exact.G, exact.H0, size.G, size.H0
        totals = [a + b for a, b in zip(totals, terms, strict=True)] if totals else list(terms)
    return tuple(totals)


def assert_pair_in_parts(layer: Layer, tensors: Tensors, parts: int) -> None:
    """To a hundred-thousandth of the sum of magnitudes: an element elsewhere is far more."""
    G, H0, totals = layer.pair(tensors, RULE)
    exact_G, exact_H0, size_G, size_H0 = in_parts(layer, tensors, RULE, parts)
    assert largest(G - exact_G) <= 1e-5 * largest(size_G)
    assert largest(H0 - exact_H0) <= 1e-5 * largest(size_H0)
    rows = tensors[1].numel() // tensors[1].shape[1]
    assert totals[-1].item() == torch.tensor(rows, dtype=torch.float32).item()


@pytest.mark.parametrize("name", [path.stem for path in tiles.SHIPPED.glob("*.json")])
def test_every_shipped_tile_is_tried_on_layers_of_its_kind(name: str) -> None:
    for entry in entries_of(Table.read(tiles.SHIPPED / f"{name}.json")):
        for layer in layers_for(entry):
            assert tiles.kind(problem_of(layer, torch.float16)) == entry.kind, (entry, layer)


@pytest.mark.parametrize("layer", [Linear(40, 5, 6), Conv(4, 3, (4, 4), 5)], ids=["linear", "conv"])
def test_a_reference_in_parts_is_the_reference(layer: Layer, fused: None) -> None:
    tensors = layer.tensors()
    exact, (G, H0, *_) = layer.reference(wide(tensors), RULE), in_parts(layer, tensors, RULE, 3)
    torch.testing.assert_close(G, exact.G)
    torch.testing.assert_close(H0, exact.H0)
    assert_pair_in_parts(layer, tensors, 3)


@gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("kind", small_tiles.KINDS)
def test_every_shipped_tile_on_many_seeds(
    kind: str, dtype: torch.dtype, device: torch.device, shipped: None, forced: Callable
) -> None:
    """The hazard is a product whose operand comes from registers: triton issue 9433."""
    for entry in entries_of(tiles.table(device)):
        if (entry.kind, entry.bits) != (kind, 16):
            continue
        for layer in layers_for(entry):
            for seed in range(4):
                torch.manual_seed(seed)
                tensors = layer.tensors(dtype)
                if isinstance(layer, Conv):
                    tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
                rule = Rule(competition=("softmax", "softhebb")[seed % 2])
                with tiles.use(entry), forced(entry.strategy):
                    assert_pair(layer, tensors, rule)


@gpu
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("rows", [64, 1000, 8192, 50001])
@pytest.mark.parametrize("neurons", [10, 64, 128, 250, 256, 1000])
def test_many_sizes_with_the_tiles_that_users_get(
    neurons: int, rows: int, dtype: torch.dtype, shipped: None, implementation: str
) -> None:
    for inputs in (64, 100, 512):
        layer = Linear(rows, inputs, neurons)
        assert_pair(layer, layer.tensors(dtype))


@gpu
def test_float32_by_tensor_cores_is_as_near_as_pytorchs(shipped: None, fused: None) -> None:
    """TF32 where torch.backends allows it; at most twice what PyTorch's own products lose."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for layer in (Linear(4096, 256, 128), Conv(8, 64, (16, 16), 64, padding=(1, 1))):
        tensors = layer.tensors()
        exact, pair = layer.reference(wide(tensors), RULE), layer.pair(tensors, RULE)
        with ghl_kernels.force("composed"):
            natural = layer.pair(tensors, RULE)
        layer.pair(tensors, RULE)
        for actual, of_pytorch, wanted in zip(pair, natural, (exact.G, exact.H0), strict=False):
            lost = largest(of_pytorch - wanted)
            assert largest(actual - wanted) <= 2 * lost + 1e-3 * largest(wanted)


LARGE: dict[str, Layer] = {
    "linear": Linear(2**25 + 2**16, 64, 8),
    "pointwise_strided": Conv(32800, 64, (32, 32), 8, kernel=(1, 1), stride=(2, 2)),
    "conv": Conv(32800, 64, (32, 32), 8, kernel=(3, 3), stride=(8, 8), padding=(1, 1)),
    "depthwise": Conv(32800, 64, (32, 32), 64, (3, 3), (8, 8), (1, 1), groups=64),
    "many_neurons": Linear(2**21 + 2**15, 16, 1024),
}


@gpu
@pytest.mark.parametrize("name", LARGE)
def test_more_than_two_billion_numbers(name: str, shipped: None, forced: Callable) -> None:
    """In x, or in y and g, with the last hundredth of the batch ten times the rest."""
    layer = LARGE[name]
    if torch.cuda.get_device_properties().total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    x, y, g, w = (random_half(t) for t in shapes_of(layer))
    assert max(x.numel(), y.numel()) > 2**31
    x[-(x.shape[0] // 100) :] *= 10
    for implementation in BY_TRITON:
        with forced(implementation):
            assert_pair_in_parts(layer, (x, y, g, w), parts=64)
    del x, y, g
    gc.collect()
    torch.cuda.empty_cache()


def shapes_of(layer: Layer) -> list[tuple[int, ...]]:
    """Shapes of x, y, g and w, with nothing allocated."""
    with torch.device("meta"):
        return [tuple(t.shape) for t in layer.tensors()]


def random_half(shape: tuple[int, ...]) -> Tensor:
    """Random in 16 bits, in channels_last order if it has four dimensions."""
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=torch.float16, memory_format=order).normal_()


def test_shapes_and_random_numbers_of_a_large_layer() -> None:
    layer = Conv(3, 4, (6, 5), 7)
    assert shapes_of(layer) == [tuple(t.shape) for t in layer.tensors()]
    x = random_half(shapes_of(layer)[0])
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.float().std() > 0.5


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


def assert_same(results: list[Tensor], wanted: list[Tensor]) -> None:
    for number, (actual, expected) in enumerate(zip(results, wanted, strict=True)):
        assert torch.equal(actual, expected), f"result {number} of the step"


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
    """Of the Triton kernels; cuDNN chooses its algorithms."""
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
    """Bytes that a call held at once beyond what was allocated before it, its results included."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


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
    results = 2 * 4 * w.numel() + 2**16  # and what an allocator rounds up
    with ghl_kernels.force("composed"):
        composed = peak_of(lambda: layer.pair(tensors, RULE))
    peak = peak_of(lambda: layer.pair(tensors, RULE))
    assert peak <= composed + results
    us = {"triton": 1, "triton_stored": 2}.get(implementation)
    if us:
        rows = y.numel() // y.shape[1]
        assert peak <= us * y.numel() * y.element_size() + 12 * rows + results


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
