"""Elements more than 2**31 elements from the first: 64-bit addresses, in views of huge strides.

The memory is mapped and hardly any of it touched; where it cannot be had, a test is skipped.
"""

from __future__ import annotations

import mmap

import pytest
import small_tiles as forms
import torch
from cases import Conv, Linear, assert_pair
from test_logsumexp import assert_logsumexp
from torch import Tensor

FAR = 2**31 + 2**24  # elements
ROW = 2**23 - 2**14  # of which 270 are far, and 256 fit into the offsets of a tile


@pytest.fixture
def memory(device: torch.device) -> Tensor:
    """More than 2**31 numbers of 16 bits."""
    size = 2 * 270 * ROW
    try:
        if device.type == "cuda":
            return torch.empty(size // 2, dtype=torch.float16, device=device)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float16)
    except (OSError, torch.OutOfMemoryError) as error:
        pytest.skip(f"no {size} bytes of address space: {error}")


def spread(t: Tensor, memory: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same values at these strides, the last of them beyond 2**31 elements from the first."""
    view = memory.as_strided(t.shape, stride)
    assert sum((n - 1) * s for n, s in zip(view.shape, stride, strict=True)) > 2**31
    return view.copy_(t)


@pytest.mark.parametrize("argument", range(3), ids="xyg")
def test_rows_of_a_linear_layer(argument: int, memory: Tensor, fused: None, use) -> None:
    layer = Linear(270, 3, 18)
    for form in (forms.WHOLE_ROWS_SPLIT, forms.ONE_SPLIT):
        use(form)
        tensors = layer.tensors(torch.float16)
        tensors[argument] = spread(tensors[argument], memory, (ROW, 1))
        assert_pair(layer, tensors)


@pytest.mark.parametrize("argument", range(3), ids="xyg")
@pytest.mark.parametrize(
    "layer",
    [
        Conv(3, 16, (2, 3), 4, kernel=(1, 2)),
        Conv(3, 2, (2, 3), 4, kernel=(1, 2)),
        Conv(3, 4, (2, 3), 4, kernel=(1, 2), groups=4),
    ],
    ids=["conv", "packed", "depthwise"],
)
def test_images_of_a_convolution(layer: Conv, argument: int, memory: Tensor, fused: None) -> None:
    tensors = layer.tensors(torch.float16)
    channels = tensors[argument].shape[1]
    stride = FAR // 2, 1, tensors[argument].shape[3] * channels, channels
    tensors[argument] = spread(tensors[argument], memory, stride)
    assert_pair(layer, tensors)


def test_rows_of_a_convolution_far_apart(memory: Tensor, fused: None) -> None:
    """A y whose positions have one stride, so that it is read in place."""
    layer = Conv(45, 4, (2, 4), 4, kernel=(1, 2))
    x, y, g, w = layer.tensors(torch.float16)
    assert_pair(layer, (x, spread(y, memory, (6 * ROW, 1, 3 * ROW, ROW)), g, w))


@pytest.mark.parametrize("neurons", [5, 20])
def test_u_is_stored_of_rows_far_apart(
    neurons: int, memory: Tensor, forced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghl_kernels.triton.store_u.LONGEST_ROW", 8)
    layer = Linear(270, 3, neurons)
    x, y, g, w = layer.tensors(torch.float16)
    with forced("triton_stored"):
        assert_pair(layer, (x, spread(y, memory, (ROW, 1)), g, w))


def test_logsumexp_of_rows_and_of_neurons_far_apart(memory: Tensor, fused: None) -> None:
    for shape, stride in (((3, 7), (FAR // 2, 1)), ((7, 3), (1, FAR // 2))):
        assert_logsumexp(spread(torch.randn(shape).half(), memory, stride))


def test_merge_of_sums_far_apart(memory: Tensor, fused: None) -> None:
    """They are brought together first, as sums in another order than the weight's are."""
    G, H0, totals, w = torch.randn(3, 5), torch.randn(3, 5), torch.rand(4), torch.randn(3, 5)
    far = spread(G.half(), memory, (FAR // 2, 1))
    merged = torch.ops.ghl_kernels.merge(far, H0, totals, w, "oja", "sign", "none")
    wanted = torch.ops.ghl_kernels.merge(G.half(), H0, totals, w, "oja", "sign", "none")
    assert all(map(torch.equal, merged, wanted))
