"""Sums that are held over backwards, beside `weight.grad` as it stands, until an optimizer's step.

Whatever is done with G (DDP, FSDP, a GradScaler, clipping) is left to those who do it. When a held
sum is stale is decided here; ranks are added up and sums merged in `ghl.deferred`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from ghl.guards import is_update
from ghl.sums import RawSums
from ghl_kernels import Rule

Begin = Callable[["HeldSums"], None]


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


class Taken(NamedTuple):
    """H0 (neurons, rest) and totals, and whether a backward gave this rank none beside a G."""

    H0: Tensor | None
    totals: Tensor | None
    lacking: bool


class HeldSums(RawSums):
    """Adds up in the gradients of the two leaves, over backwards, as autograd does in the weight's.

    begin is called with these sums before the first of a backward's gradients is added.
    """

    def __init__(self, weight: nn.Parameter, rule: Rule, begin: Begin) -> None:
        super().__init__(weight, rule)
        self._half: str | None = None  # which of G and H0 has come without the other
        self._task = -1  # the backward that these sums were last part of
        self._version = 0
        owner = weakref.ref(self)  # a leaf and its owner in a cycle would never be collected

        def arrives(name: str) -> Any:
            def arrive(grad: Tensor) -> None:
                if (sums := owner()) is not None and sums.live:
                    sums._arrive(name, begin)

            return arrive

        def accumulated(weight: Tensor) -> None:
            if (sums := owner()) is not None:
                sums._accumulated(weight)

        self._hooks = [
            self.hebbian.register_hook(arrives("H0")),
            self.totals.register_hook(arrives("totals")),
            weight.register_hook(arrives("G")),
            weight.register_post_accumulate_grad_hook(accumulated),
        ]

    def _arrive(self, name: str, begin: Begin) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            begin(self)
            self._task = task
        if name != "totals":  # they come beside H0, in no set order
            self._half = name if self._half in (None, name) else None

    def _accumulated(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self._version = local(weight.grad)._version

    @torch.no_grad()
    def follow(self, weight: Tensor, arriving: bool) -> None:
        """Drop what an earlier accumulation left, which `weight.grad` tells: None or all zeros.

        arriving: gradients of this weight come next. Of another weight, one half of the sums may
        be on its way in a backward around this one (a reentrant checkpoint).
        """
        grad = weight.grad
        if grad is None:
            if arriving or self._half is None:
                self.drop()
        elif is_update(grad):
            if local(grad).any():
                raise RuntimeError(
                    "weight.grad still holds the update of the last step, to which a backward "
                    "must not add: call optimizer.zero_grad() after every optimizer.step()"
                )
            del grad._ghl_update  # type: ignore[attr-defined]  # zeroed in place
            self.drop()
        elif local(grad)._version != self._version:  # changed in place since: zeroed, perhaps
            self._keep(local(grad).any())

    def drop(self) -> None:
        """Forget everything that is held."""
        self._half = self.hebbian.grad = self.totals.grad = None

    def _keep(self, condition: Tensor) -> None:
        for leaf in (self.hebbian, self.totals):
            if leaf.grad is not None:
                leaf.grad = leaf.grad.where(condition, 0)

    def take(self) -> Taken:
        """What is held; from then on nothing is."""
        taken = Taken(self.hebbian.grad, self.totals.grad, self.hebbian.grad is None)
        self.drop()
        return taken


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

    def _accumulated(self, weight: Tensor) -> None:
        super()._accumulated(weight)
        if self.rule.gate != "sign_only":
            self._reduce(weight)

    @torch.no_grad()
    def _reduce(self, weight: Tensor) -> None:
        assert isinstance(weight, DTensor)
        self._lacking |= self.hebbian.grad is None
        H0, totals = (
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for leaf in (self.hebbian, self.totals)
        )
        self._half = self.hebbian.grad = self.totals.grad = None
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

    def drop(self) -> None:
        """Forget what has been reduced; what has not, FSDP keeps of G as well."""
        self._half, self._held, self._lacking = None, None, False

    def _keep(self, condition: Tensor) -> None:
        if self._held is not None:
            self._held = tuple(t.where(condition, 0) for t in self._held)  # type: ignore

    def take(self) -> Taken:
        lacking, held = self._lacking, self._held
        self.drop()
        if held is None or held[0].shape[0] == 0:
            return Taken(None, None, lacking)
        H0, neurons = held
        return Taken(H0, torch.cat([neurons[:, 0], neurons[:1, 1]]), lacking)


def is_sharded(weight: Tensor) -> bool:
    """Whether the weight is one of FSDP's; raises ValueError for a sharding that has no rule."""
    if not isinstance(weight, DTensor):
        return False
    if not all(isinstance(p, Replicate) or p.is_shard(0) for p in weight.placements):
        raise ValueError(
            f"weight has placements {weight.placements}, must be sharded by fully_shard on "
            "dimension 0, its neurons"
        )
    return True
