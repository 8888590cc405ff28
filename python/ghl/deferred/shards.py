"""Sums of weights that `fully_shard` sharded, added up over the ranks where FSDP reduces G."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from ghl.deferred.held import ADDED, REPLACED, Begin, HeldSums, Taken, has_nothing, is_owed
from ghl.guards import is_update, unmark_update
from ghl.ranks import local
from ghl.sums import RawSums, without_sums
from ghl_kernels import Rule


class ShardedSums(HeldSums):
    """Sums of a weight that `fully_shard` sharded on its neurons: each rank holds its neurons'.

    They are added up over the ranks where FSDP reduces G: autograd adds them until then, as it
    does G. FSDP calls the hook on the sharded weight in the same order on all ranks.
    """

    sharded = True

    def __init__(
        self, weight: nn.Parameter, rule: Rule, begin: Begin, wire: torch.dtype | None
    ) -> None:
        super().__init__(weight, rule, begin)
        self._wire = wire
        self._held: tuple[Tensor, Tensor] | None = None
        self._lacking = False
        self._size: Tensor | None = None  # Σ |G| as the last backward left it, once that has ended
        self._spared: Tensor | None = None  # whether it is zero, and what is held counts still
        self._leftover: Tensor | None = None  # whether an update had numbers as a backward began
        former = RawSums.latest(weight)
        # what FSDP has yet to add to weight.grad has lost its sums as well
        self._lost = isinstance(former, ShardedSums) and former.is_between

    @property
    def is_between(self) -> bool:
        return self._lost or self.hebbian.grad is not None

    def follow(self, weight: Tensor) -> None:
        """And look at an update to which FSDP may add what no hook tells of, where no H0 comes."""
        super().follow(weight)
        grad = weight.grad
        if not self.rule.needs_hebbian:
            update = grad if grad is not None and is_update(grad) else None
            self._leftover = None if update is None else local(update).any()

    def _accumulated(self, weight: Tensor) -> None:
        grad, has_sums = weight.grad, self.rule.needs_hebbian
        if not has_sums and grad is not None and is_update(grad):
            unmark_update(grad)
            if self._leftover is not None and not has_nothing(self._leftover):
                self._incomplete = ADDED
            self._leftover = None
        super()._accumulated(weight)
        if has_sums:
            self._reduce(weight)

    @torch.no_grad()
    def _reduce(self, weight: Tensor) -> None:
        assert isinstance(weight, DTensor)
        if self._lost:
            self._incomplete, self._lost = REPLACED, False
        self._lacking |= self.hebbian.grad is None
        H0, totals = (
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for leaf in (self.hebbian, self.totals)
        )
        self.hebbian.grad = self.totals.grad = self._size = self._spared = None
        if H0.device.type != "cpu":  # FSDP reduces in a stream of its own
            stream = torch.accelerator.current_stream()
            for t in (H0, totals):
                t.record_stream(stream)  # type: ignore[arg-type]
        neurons = torch.stack([totals[:-1], totals[-1].expand(weight.shape[0])], 1)
        reduced = (
            self._own_neurons(H0.to(self._wire or H0.dtype), weight).to(H0.dtype),
            self._own_neurons(neurons, weight),
        )
        if self._held is not None:
            reduced = self._held[0].add_(reduced[0]), self._held[1].add_(reduced[1])
        self._held = reduced

    @staticmethod
    def _own_neurons(t: Tensor, weight: DTensor) -> Tensor:
        mesh = weight.device_mesh
        summands = DTensor.from_local(t, mesh, [Partial()] * mesh.ndim, run_check=False)
        own = summands.redistribute(mesh, weight.placements).to_local()
        return own.to(weight.to_local().device)

    def check(self, weight: Tensor) -> None:
        super().check(weight)
        rows = None if self._held is None else self._held[1][:, 1]
        bare = rows is None or (self._lacking and not rows.any())
        if bare and self.rule.needs_hebbian and is_owed(weight):
            raise RuntimeError(without_sums([weight]))

    def drop(self) -> None:
        """Forget what has been reduced; what has not, FSDP keeps of G as well."""
        self._held = self._size = self._spared = None
        self._lacking = False
        self._forget()

    @staticmethod
    @torch.no_grad()
    def note_sizes(pairs: Sequence[tuple[nn.Parameter, HeldSums]]) -> None:
        """At the end of a backward, in one operation."""
        noted = [
            (sums, local(weight.grad))
            for weight, sums in pairs
            if isinstance(sums, ShardedSums) and sums._held and weight.grad is not None
        ]
        sizes = torch._foreach_norm([grad for _, grad in noted], 1) if noted else []
        for (sums, _), size in zip(noted, sizes, strict=True):
            sums._size = size

    @staticmethod
    @torch.no_grad()
    def compare_sizes(pairs: Sequence[tuple[nn.Parameter, HeldSums]]) -> None:
        """Before gradients are looked at. That of a shard whose neurons are all silent is zeros,
        scaled or zeroed; those that were not tell which, of all weights that this rank has."""
        noted = [
            (sums, sums._size, weight.grad)
            for weight, sums in pairs
            if isinstance(sums, ShardedSums) and sums._size is not None and weight.grad is not None
        ]
        if not noted:
            return
        before = torch.stack([size for _, size, _ in noted]) != 0
        now = torch.stack(torch._foreach_norm([local(grad) for *_, grad in noted], 1)) != 0
        kept = (before & now).any()
        for sums, size, grad in noted:
            # where nothing had numbers, all that is left to ask is whether it was changed
            spared = kept | ~before.any() if HeldSums._left(sums, grad) else kept
            sums._spared = (size == 0) & spared

    def _left(self, grad: Tensor) -> bool:
        """Only within a backward for sure: operations on many DTensors at once change no version,
        zero_grad of a fused optimizer for one."""
        return self._size is None and super()._left(grad)

    def _keep_beside(self, grad: Tensor) -> None:
        """Drop it where the gradient is all zeros and was not, or was zeroed with the others."""
        found = local(grad).any()
        self._keep(found if self._spared is None else found | self._spared)

    def _keep(self, condition: Tensor) -> None:
        if self._held is not None:
            H0, neurons = self._held
            self._held = H0.where(condition, 0), neurons.where(condition, 0)

    def take(self) -> Taken:
        held = self._held
        self.drop()
        if held is None or held[0].shape[0] == 0:
            return Taken(None, None, self.used_in, held is None)
        H0, neurons = held
        totals = torch.cat([neurons[:, 0], neurons[:1, 1]])
        return Taken(H0, totals, self.used_in, False)  # see `check`


def is_on_neurons(weight: DTensor) -> bool:
    """Whether every rank that has a neuron has all of its weights."""
    return all(isinstance(p, Replicate) or p.is_shard(0) for p in weight.placements)


def is_sharded(weight: Tensor) -> bool:
    """Whether the weight is one of FSDP's; raises ValueError for a sharding that has no rule."""
    if not isinstance(weight, DTensor):
        return False
    if not is_on_neurons(weight):
        raise ValueError(
            f"weight has placements {weight.placements}, must be sharded by fully_shard on "
            "dimension 0, its neurons (tensor parallelism is not supported)"
        )
    return True
