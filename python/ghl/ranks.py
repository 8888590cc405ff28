"""What ranks do together: add up tensors in few messages, and make sure that they agree.

Which tensors these are is `ghl.deferred.merging`'s business, and when is `ghl.deferred`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

BUCKET = 25 * 2**20  # bytes, DDP's own choice


def size(group: Any) -> int:
    """The number of ranks of a process group; 1 where there is none."""
    return 1 if group is None else dist.get_world_size(group)


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors of one dtype and device, in order, to be sent as one message."""
    by_kind: dict[Any, list[int]] = {}
    for index, t in enumerate(tensors):
        by_kind.setdefault((t.dtype, t.device), []).append(index)
    for indices in by_kind.values():
        bucket: list[int] = []
        nbytes = 0
        for index in indices:
            bucket.append(index)
            nbytes += tensors[index].nbytes
            if nbytes >= BUCKET:
                yield bucket
                bucket, nbytes = [], 0
        if bucket:
            yield bucket


def add_over_ranks(tensors: list[Tensor], group: Any, wire: torch.dtype | None = None) -> None:
    """Replace each tensor in the list by its sum over the ranks, sent as dtype `wire`.

    The list lets go of a tensor as soon as it is in a message.
    """
    sent, kinds = [], [(t.shape, t.dtype) for t in tensors]
    for bucket in buckets(tensors):
        flat = torch.cat([tensors[i].flatten().to(wire or tensors[i].dtype) for i in bucket])
        for i in bucket:
            tensors[i] = flat[:0]
        sent.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for bucket, flat, work in sent:
        work.wait()
        parts = flat.split([kinds[i][0].numel() for i in bucket])
        for i, part in zip(bucket, parts, strict=True):
            shape, dtype = kinds[i]
            tensors[i] = part.view(shape).to(dtype)


@contextlib.contextmanager
def together(group: Any, device: torch.device) -> Iterator[None]:
    """Raise on every rank what one of them raises inside: none waits for messages of that one.

    Without waiting for a GPU, which aborts by itself.
    """
    if size(group) == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = torch.full((), float(error is not None), device=device)
    dist.all_reduce(failed, group=group)
    if error is not None:
        raise error
    if failed.is_cuda:
        torch._assert_async(failed == 0, ELSEWHERE)
    elif failed:
        raise RuntimeError(ELSEWHERE)


ELSEWHERE = "another rank could not make its updates, and its error says why"
AGREED = "have the same layers, dtypes and rules in the same order"


def gather(value: Any, group: Any, weights: Iterable[Tensor]) -> list[Any]:
    """What every rank has given. weights: of the device that NCCL is to send from; it would take
    the current one, perhaps the same on all ranks."""
    gathered: list[Any] = [None] * size(group)
    devices = {weight.device for weight in weights if weight.is_cuda}
    with torch.cuda.device(devices.pop()) if devices else contextlib.nullcontext():
        dist.all_gather_object(gathered, value, group=group)
    return gathered


def check_same(lines: list[str], group: Any, weights: Iterable[Tensor], must: str = AGREED) -> None:
    """Raise on every rank, with the first difference, unless all have the same lines.

    A rank that has found an error of its own sends that, so that none waits for it.
    """
    if size(group) == 1:
        return
    gathered = gather(lines, group, weights)
    for rank, other in enumerate(gathered):
        if other == gathered[0]:
            continue
        for number in range(max(len(other), len(gathered[0]))):
            mine, theirs = (
                every[number] if number < len(every) else "nothing more"
                for every in (gathered[0], other)
            )
            if mine != theirs:
                raise RuntimeError(
                    f"ranks differ, must {must}: "
                    f"rank 0 of the group has {mine}; rank {rank} has {theirs}"
                )
