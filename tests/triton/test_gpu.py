"""What only a GPU shows: the shipped tiles as compiled, and layers of every size.

Tests without the mark `gpu` run the helpers of this file where there is none.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import small_tiles
import torch
from cases import Conv, Layer, Linear, Tensors, assert_pair, largest, problem_of, wide
from small_tiles import COMPILED
from torch import Tensor

import ghl_kernels
from ghl_kernels import Rule, dispatch
from ghl_kernels.cuda.kernels import EXCHANGED
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import BY_SM90, Entry, Table

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
RULE = Rule()
BY_TRITON = ("triton", "triton_stored")


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


def assert_pair_in_parts(layer: Layer, tensors: Tensors, parts: int, wanted: str = "sums") -> None:
    """To a hundred-thousandth of the sum of magnitudes: an element elsewhere is far more."""
    G, H0, totals = layer.pair(tensors, RULE, wanted)
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


def skip_on_a_small_gpu() -> None:
    """Of layers of more than 2**31 numbers, with what a comparison of them holds."""
    if torch.cuda.get_device_properties().total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")


@gpu
@pytest.mark.parametrize("name", LARGE)
def test_more_than_two_billion_numbers(name: str, shipped: None, forced: Callable) -> None:
    """In x, or in y and g, with the last hundredth of the batch ten times the rest."""
    layer = LARGE[name]
    skip_on_a_small_gpu()
    x, y, g, w = (random_half(t) for t in shapes_of(layer))
    assert max(x.numel(), y.numel()) > 2**31
    x[-(x.shape[0] // 100) :] *= 10
    for implementation in (*BY_TRITON, *COMPILED, *BY_SM90):
        if dispatch.unavailable(implementation, x, problem_of(layer, x.dtype)):
            continue  # what runs everywhere is asked for by name in other tests
        with forced(implementation):
            wanted = "rows" if implementation == EXCHANGED else "sums"
            assert_pair_in_parts(layer, (x, y, g, w), 64, wanted)
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
