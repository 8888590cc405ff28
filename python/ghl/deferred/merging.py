"""From the sums that layers held to their updates: added up over ranks, merged many at once.

Functions of the moment before a step; nothing here outlives it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ghl import ranks
from ghl.deferred import dtypes
from ghl.deferred.held import HeldSums, note_versions
from ghl.guards import is_update, mark_update
from ghl.ranks import local
from ghl.sums import without_sums
from ghl_kernels import Rule
from ghl_kernels.composed import gated, sign

Item = TypeVar("Item")


@dataclasses.dataclass
class Layer:
    """One weight and its sums; of a sharded weight, this rank's part of both."""

    weight: nn.Parameter
    rule: Rule
    sharded: bool
    leaves: tuple[Tensor, Tensor]
    H0: Tensor | None
    totals: Tensor | None
    used_in: torch.dtype | None
    lacking: bool
    sent: Tensor | None = None  # the sum of what ranks have sent of `used_in`

    @classmethod
    def of(cls, weight: nn.Parameter, sums: HeldSums) -> Layer:
        taken = sums.take()
        if weight.grad is None:  # zeroed after the last backward, and with it what was held
            taken = taken._replace(H0=None, totals=None, used_in=None)
        leaves = sums.hebbian, sums.totals
        return cls(weight, sums.rule, sums.sharded, leaves, *taken)

    @property
    def has_largest_elsewhere(self) -> bool:
        """Whether max|H|, which the update is divided by, is that of all ranks' parts."""
        return self.sharded and self.rule.needs_hebbian and self.rule.normalize == "absmax"

    @property
    def is_due(self) -> bool:
        """Whether this rank has an ordinary gradient to make an update of."""
        grad = self.weight.grad
        return grad is not None and not is_update(grad) and local(grad).numel() > 0

    @property
    def G(self) -> Tensor:
        assert self.weight.grad is not None
        return local(self.weight.grad)

    @property
    def compute_dtype(self) -> torch.dtype:
        """In which forwards used the weight, on any rank."""
        return self.used_in or self.weight.dtype

    @property
    def is_bare(self) -> Tensor:
        """Whether no rank had sums beside this rank's gradient."""
        assert self.totals is not None
        return (self.totals[-1] == 0).to(self.G.device) & self.G.any()

    def put(self, update: Tensor) -> None:
        """Hand the update to the optimizer."""
        if self.sharded:
            self.G.copy_(update)
        else:
            self.weight.grad = update
        assert self.weight.grad is not None
        mark_update(self.weight.grad)
        note_versions(self.weight.grad)


def take_off_scale(optimizer: Any) -> None:
    """Divide gradients by the scale that a GradScaler has a fused optimizer divide by: an update
    has no such scale, and times it would not be finite in float16."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    weights = (p for group in optimizer.param_groups for p in group["params"])
    grads = (local(p.grad) for p in weights if p.grad is not None)
    for same in grouped(grads, lambda grad: grad.device):
        torch._foreach_mul_(same, scale.double().reciprocal().float().to(same[0].device))
    optimizer.grad_scale = None


def add_up(layers: Sequence[Layer], group: Any, wire: torch.dtype | None) -> None:
    """Sum H0 and totals of whole weights over the ranks; a rank that has none adds zeros, and is
    told the dtype in which the others used the weight.

    FSDP's have been summed in backward. Raises RuntimeError where no rank had sums beside a G.
    """
    whole = [layer for layer in layers if layer.rule.needs_hebbian and not layer.sharded]
    if whole and ranks.size(group) > 1:
        H0 = [torch.zeros_like(x.leaves[0]) if x.H0 is None else x.H0 for x in whole]
        totals = [torch.zeros_like(x.leaves[1]) if x.totals is None else x.totals for x in whole]
        for layer in whole:
            layer.H0 = None  # its memory is free as soon as it is in a message
        sent = [dtypes.sent(x.used_in, t) for x, t in zip(whole, totals, strict=True)]
        beside = [*totals, *sent]
        ranks.add_over_ranks(H0, group, wire)
        ranks.add_over_ranks(beside, group)
        totals, sent = beside[: len(whole)], beside[len(whole) :]
        for layer, *sums in zip(whole, H0, totals, sent, strict=True):
            layer.H0, layer.totals, layer.sent = sums
    due = [layer for layer in layers if layer.is_due and layer.rule.needs_hebbian]
    check_rows([layer for layer in due if layer.lacking])
    learn_dtypes([layer for layer in due if layer.used_in is None])


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> Iterator[list[Item]]:
    """Those that have a key in common, in their order."""
    by_key: dict[Any, list[Item]] = {}
    for item in items:
        by_key.setdefault(key(item), []).append(item)
    yield from by_key.values()


def check_rows(layers: Sequence[Layer]) -> None:
    """A gradient without sums must not pass for an update; of zeros, the update is zero."""
    for layer in layers:
        if layer.H0 is None or layer.totals is None:
            neurons, rest = layer.G.flatten(1).shape
            layer.H0 = layer.leaves[0].new_zeros(neurons, rest)
            layer.totals = layer.leaves[1].new_zeros(neurons + 1)
    for same in grouped(layers, lambda layer: layer.G.device):
        bare = torch.stack([layer.is_bare for layer in same]).tolist()  # one wait for all
        found = [layer.weight for layer, flag in zip(same, bare, strict=True) if flag]
        if found:
            raise RuntimeError(without_sums(found))


def learn_dtypes(layers: Iterable[Layer]) -> None:
    """In which dtype others have used the weights that this rank has not."""
    told = [(layer, layer.sent) for layer in layers if layer.sent is not None]
    for same in grouped(told, lambda pair: pair[1].device):
        numbers = torch.stack([sent for _, sent in same]).tolist()  # one wait for all
        for (layer, _), sums in zip(same, numbers, strict=True):
            layer.used_in = dtypes.told(sums)


def updates(layers: Sequence[Layer]) -> Iterator[tuple[Layer, Tensor]]:
    """Every layer that is due, with its update: one operation for all that share a rule."""
    whole = (layer for layer in layers if layer.is_due and not layer.has_largest_elsewhere)
    for same in grouped(whole, kind_of_merge):
        yield from zip(same, merged(same, same[0].rule), strict=True)
    yield from updates_of_shards([layer for layer in layers if layer.has_largest_elsewhere])


def kind_of_merge(layer: Layer) -> tuple[Any, ...]:
    """What layers that are merged by one operation have in common."""
    rule, G = layer.rule, layer.G
    return rule.decay, rule.gate, rule.normalize, G.dtype, G.device, layer.compute_dtype


def merged(layers: Sequence[Layer], rule: Rule, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What the merge gives for each layer under the decay, gate and normalisation of `rule`;
    forwards have used all of them in one dtype."""
    if not rule.needs_hebbian:
        return [sign(layer.G) for layer in layers]
    return torch.ops.ghl_kernels.foreach_merge_no_grad(
        [layer.G.to(dtype or layer.G.dtype) for layer in layers],
        [layer.H0 for layer in layers],
        [layer.totals for layer in layers],
        [local(layer.weight.detach()) for layer in layers],
        rule.decay, rule.gate, rule.normalize, layers[0].compute_dtype,
    )[0]  # fmt: skip


def updates_of_shards(layers: Sequence[Layer]) -> Iterator[tuple[Layer, Tensor]]:
    """absmax of sharded weights: each rank's H, divided by the largest |H| of all ranks."""
    H: list[Tensor | None] = []
    for layer in layers:
        walk = layer.rule.replace(gate="hebb", normalize="none")  # which gives -H
        H.append(-merged([layer], walk, layer.leaves[0].dtype)[0] if layer.is_due else None)
    for layer, largest, h in zip(layers, absmax_over_ranks(layers, H), H, strict=True):
        if h is not None:
            h = h / (largest.to(h.device) + 1e-30)
            yield layer, gated(layer.G, h, largest, layer.rule.gate, "none")


def absmax_over_ranks(layers: Sequence[Layer], H: Sequence[Tensor | None]) -> list[Tensor]:
    """The largest |H| of each layer, one message for all layers of a device mesh."""
    if not layers:
        return []
    largest = [layer.leaves[0].new_zeros(()) for layer in layers]
    for i, h in enumerate(H):
        if h is not None:
            largest[i] = h.abs().amax().to(largest[i])
    by_mesh: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        assert isinstance(layer.weight, DTensor)
        by_mesh.setdefault((layer.weight.device_mesh, largest[i].dtype), []).append(i)
    for (mesh, _), indices in by_mesh.items():
        message = torch.stack([largest[i] for i in indices])
        for group in mesh.get_all_groups():
            dist.all_reduce(message, dist.ReduceOp.MAX, group=group)
        for i, number in zip(indices, message, strict=True):
            largest[i] = number
    return largest
