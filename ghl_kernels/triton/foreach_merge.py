"""The merge of many layers in two launches, as `merge.py` does it for one.

Cost: that of the merges, without their launches; a table of addresses goes to the GPU with each
call, without waiting for it. For: all layers of a model before an optimizer's step. Layers of
different dtypes go in launches of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.merges import Layer, foreach_merge_of
from ghl_kernels.triton.launch import launch
from ghl_kernels.triton.merge import MOST_PROGRAMS, combine, measure

BLOCK_K, BLOCK_P = 8, 256
FIELDS = tl.constexpr(len(Layer._fields) + 2)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_captured: list[Tensor] = []


@triton.jit
def address(table, layer, FIELD: tl.constexpr, TYPE: tl.constexpr):
    return tl.load(table + layer * FIELDS + FIELD).to(tl.pointer_type(TYPE))


@triton.jit
def foreach_measure_kernel(
    table, shares,
    DECAY: tl.constexpr, G_TYPE: tl.constexpr, H0_TYPE: tl.constexpr, TOTALS_TYPE: tl.constexpr,
    W_TYPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    share = shares + 3 * tl.program_id(0)
    layer, program = tl.load(share), tl.load(share + 1)
    k = program * BLOCK_K + tl.arange(0, BLOCK_K)
    measure(
        address(table, layer, 0, G_TYPE), address(table, layer, 1, H0_TYPE),
        address(table, layer, 2, TOTALS_TYPE), address(table, layer, 3, W_TYPE),
        address(table, layer, 4, tl.float32), address(table, layer, 5, tl.float32),
        k, tl.load(table + layer * FIELDS + 8).to(tl.int32),
        tl.load(table + layer * FIELDS + 9).to(tl.int32), DECAY, BLOCK_P,
    )  # fmt: skip


@triton.jit
def foreach_combine_kernel(
    table, shares,
    DECAY: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
    G_TYPE: tl.constexpr, H0_TYPE: tl.constexpr, TOTALS_TYPE: tl.constexpr,
    W_TYPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    share = shares + 3 * tl.program_id(0)
    layer = tl.load(share)
    combine(
        address(table, layer, 0, G_TYPE), address(table, layer, 1, H0_TYPE),
        address(table, layer, 2, TOTALS_TYPE), address(table, layer, 3, W_TYPE),
        address(table, layer, 4, tl.float32), address(table, layer, 5, tl.float32),
        address(table, layer, 6, G_TYPE), address(table, layer, 7, tl.float32),
        tl.load(share + 1), tl.load(share + 2),
        tl.load(table + layer * FIELDS + 8).to(tl.int32),
        tl.load(table + layer * FIELDS + 9).to(tl.int32),
        DECAY, GATE, NORMALIZE, BLOCK_K, BLOCK_P,
    )  # fmt: skip


def on_device(numbers: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers on the device, copied behind what is queued there, without waiting."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype)
    pinned = torch.tensor(numbers, dtype=dtype, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)  # a replay of the graph copies it again
    return pinned.to(device, non_blocking=True)


def shares_of(programs: tuple[int, ...], device: torch.device) -> Tensor:
    """For every program of a launch: its layer, its number there, how many the layer has."""
    numbers = [(layer, i, count) for layer, count in enumerate(programs) for i in range(count)]
    return on_device(numbers, torch.int32, device)


@functools.lru_cache(maxsize=64)
def remembered_shares(programs: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """The same, copied once for each stream: another would have to wait for the copy."""
    return shares_of(programs, device)


def shares(programs: tuple[int, ...], device: torch.device) -> Tensor:
    """The same, remembered but for a capture: what that copies is there only in a replay."""
    if device.type != "cuda":
        return remembered_shares(programs, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return shares_of(programs, device)
    return remembered_shares(programs, device, torch.cuda.current_stream(device).cuda_stream)


def merge_alike(layers: Sequence[Layer], decay: str, gate: str, normalize: str) -> None:
    """Fill the results of layers that agree in the dtypes of their tensors."""
    device, types = layers[0].G.device, [TYPES[t.dtype] for t in layers[0][:4]]
    sizes = [(t.w.shape[0], t.w[0].numel()) for t in layers]
    table = on_device(
        [
            [*(t.data_ptr() for t in layer), *size]
            for layer, size in zip(layers, sizes, strict=True)
        ],
        torch.int64,
        device,
    )
    # no triton.cdiv, which takes as long as an allocation
    in_measure = tuple(-(-k // BLOCK_K) for k, _ in sizes)
    in_combine = tuple(
        min(programs * -(-columns // BLOCK_P), MOST_PROGRAMS)
        for programs, (_, columns) in zip(in_measure, sizes, strict=True)
    )
    launch(
        foreach_measure_kernel, (sum(in_measure),), table, shares(in_measure, device),
        decay, *types, BLOCK_K, BLOCK_P,
    )  # fmt: skip
    launch(
        foreach_combine_kernel, (sum(in_combine),), table, shares(in_combine, device),
        decay, gate, normalize, *types, BLOCK_K, BLOCK_P,
    )  # fmt: skip


def fill(layers: Sequence[Layer], decay: str, gate: str, normalize: str) -> None:
    """Fill the results of layers, those of the same dtypes at once."""
    alike: dict[tuple, list[Layer]] = {}
    for layer in layers:
        alike.setdefault(tuple(t.dtype for t in layer[:4]), []).append(layer)
    for group in alike.values():
        merge_alike(group, decay, gate, normalize)


foreach_merge = foreach_merge_of(fill)
