"""Sums that are held over backwards, beside `weight.grad` as it stands, until an optimizer's step.

Whatever is done with G (DDP, FSDP, a GradScaler, clipping) is left to those who do it. When a held
sum is stale is decided here; ranks are added up and sums merged in `ghl.deferred.merging`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from ghl.guards import is_update, unmark_update
from ghl.ranks import local
from ghl.sums import TRANSFORMED, RawSums, described, register_first
from ghl_kernels import Rule
from ghl_kernels.layout import is_channels_last

REPLACED = (
    "weight.grad holds a gradient whose sums are gone: the layer was moved, converted, given "
    "another rule or synchronized within an accumulation; call optimizer.zero_grad() first"
)
DROPPED = (
    "weight.grad holds a gradient whose sums were not made: call backward() without inputs=, and "
    "optimizer.zero_grad() before that"
)
FAILED = (
    "weight.grad holds a gradient whose sums a step has used up that raised an error, and made no "
    "update of them: call optimizer.zero_grad() first"
)
RAISED = (
    "a backward that raised an error has added to the sums of weight.grad, and not to that: call "
    "optimizer.zero_grad() first"
)
REORDERED = (
    "weight was given another memory format within an accumulation, and its sums have the former: "
    "call optimizer.zero_grad() first"
)
ADDED = (
    "weight.grad still held the update of the last step when a backward added to it: call "
    "zero_grad() of its optimizer after every step of it, and before the backward whose gradients "
    "the next one is to use"
)
CAPTURED = (
    "weight.grad was made in a CUDA graph, whose replay would not renew the update of a step "
    "outside: capture optimizer.step() in the same graph"
)

Begin = Callable[["HeldSums"], None]


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@torch.compiler.disable
def in_compiled_autograd() -> bool:
    """Whether a backward runs that was compiled as a whole, and does not look at leaves again."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return getattr(module, "in_compiled_autograd_region", False)


def is_owed(weight: Tensor) -> bool:
    """Whether `weight.grad` is an ordinary gradient, not all zeros, that awaits its update."""
    grad = weight.grad
    return grad is not None and not is_update(grad) and bool(local(grad).any())


def is_zeroed(update: Tensor) -> bool:
    """Whether an update was zeroed in place; a GPU aborts by itself if it was changed otherwise."""
    here = local(update)
    if is_unchanged(update) and (here is update or here.any()):  # see ShardedSums._left
        return False
    return has_nothing(here.any())


def has_nothing(found: Tensor) -> bool:
    """Whether numbers were not found; a GPU aborts by itself if they were."""
    if found.is_cuda:
        torch._assert_async(~found, ADDED)
        return True
    return not found


def versions(grad: Tensor) -> tuple[int, int]:
    """How often a gradient was changed in place: as it is, and as a rank's part of a DTensor."""
    return grad._version, local(grad)._version


def note_versions(update: Tensor) -> None:
    """Let `is_zeroed` and `HeldSums.before_step` know whether somebody changes this update."""
    update._ghl_versions = versions(update)  # type: ignore[attr-defined]


def is_unchanged(update: Tensor) -> bool:
    """Whether nobody has changed an update since it was handed to the optimizer."""
    return getattr(update, "_ghl_versions", None) == versions(update)


class Taken(NamedTuple):
    """H0 (neurons, rest) and totals; in which dtype this rank's forwards used the weight, if they
    did; and whether a backward gave this rank no sums beside a G."""

    H0: Tensor | None
    totals: Tensor | None
    used_in: torch.dtype | None
    lacking: bool


class HeldSums(RawSums):
    """Adds up in the gradients of the two leaves, over backwards, as autograd does in the weight's.

    What is held goes by what weight.grad is as a backward begins:
        None                                      dropped
        an update, zeroed in place                dropped; it is an ordinary gradient again
        an update, not zeroed                     dropped, and the step refuses what is added
        the gradient that the last one left       kept
        another, or changed in place              kept, unless it is all zeros

    begin is called with these sums before the first of a backward's gradients is added.
    """

    held = True

    def __init__(self, weight: nn.Parameter, rule: Rule, begin: Begin) -> None:
        super().__init__(weight, rule)
        self._half: dict[int, str] = {}  # of a backward, what came without the other; not of shards
        self._task = -1  # the backward that these sums were last part of
        self._versions = 0, 0
        self._grad: Any = None  # a weak reference to weight.grad as a backward left it
        self._captured = False
        # the dtype in which the forward of the H0 that came last used the weight
        self.used_in: torch.dtype | None = None
        self._channels_last: bool | None = None  # the memory order of what is held
        former = RawSums.latest(weight)
        lost = is_owed(weight) or (isinstance(former, HeldSums) and former.holds(weight))
        self._incomplete = REPLACED if lost else None  # why H0 lacks what G has
        self._note(weight.grad)
        owner = weakref.ref(self)  # a leaf and its owner in a cycle would never be collected

        def arrives(name: str) -> Any:
            @unserializable_hook
            def arrive(grad: Tensor | None) -> Tensor | None:
                sums = owner()
                if sums is None or not sums.live or grad is None:
                    return None
                if sums._is_frozen():
                    return None if name == "G" else torch.zeros_like(grad)
                sums._arrive(name, begin)
                return None

            return arrive

        def accumulated(weight: Tensor) -> None:
            if (sums := owner()) is not None:
                sums._accumulated(weight)

        self._hooks = [
            self.hebbian.register_hook(arrives("H0")),
            self.totals.register_hook(arrives("totals")),
            weight.register_hook(arrives("G")),
            register_first(weight, accumulated),  # others may be an optimizer's step
        ]

    def _arrive(self, name: str, begin: Begin) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            begin(self)  # while _task is still the backward before
            self._task = task
        if name == "H0":
            self.used_in = self.dtype_of_pair()
            self.hebbian._ghl_paired = -1  # type: ignore[attr-defined]
            self._came(name)

    def _came(self, name: str) -> None:
        """Of G and H0, which come in no set order: H0 without a G is what an error left."""
        task = torch._C._current_graph_task_id()
        if not self.sharded and self._half.pop(task, name) == name:
            self._half[task] = name

    def _is_frozen(self) -> bool:
        """Since its forward: autograd adds nothing to the weight's gradient, nor is H0 to be."""
        weight = self._weight()
        return weight is not None and not weight.requires_grad and not self.sharded

    def _accumulated(self, weight: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if not self.sharded and task != self._task:
            return  # of no gradient, after which autograd's hooks run too
        if self._is_frozen():
            return
        self._came("G")
        if self.transformed == task:
            self._incomplete = DROPPED
            raise RuntimeError(TRANSFORMED)
        self._note(weight.grad)
        self._captured |= capturing()
        if getattr(self.hebbian, "_ghl_paired", -1) == task != -1:
            self._incomplete = DROPPED
        if not self.sharded:
            channels_last = is_channels_last(weight)
            if not {self._channels_last, self.channels_last} <= {None, channels_last}:
                self._incomplete = REORDERED
            self._channels_last = channels_last

    @property
    def is_polluted(self) -> bool:
        return self._incomplete is ADDED

    def check(self, weight: Tensor) -> None:
        """Raise, and keep all, where the sums are not those of the gradient that is held."""
        reason = self._reason(weight)
        matters = reason is ADDED or self.rule.needs_hebbian
        if reason is not None and matters and is_owed(weight):
            raise RuntimeError(f"{reason} (layer {described(weight)})")
        if self._captured and not capturing():
            raise RuntimeError(CAPTURED)

    def _reason(self, weight: Tensor) -> str | None:
        """Why the sums are not those of the gradient that is held."""
        if self._channels_last not in (None, is_channels_last(weight)):
            return REORDERED
        return RAISED if "H0" in self._half.values() else self._incomplete

    @property
    def is_between(self) -> bool:
        """Whether FSDP has yet to reduce what is held."""
        return False

    def holds(self, weight: Tensor) -> bool:
        """Whether sums are held beside a gradient that was not zeroed, though it may be zero."""
        grad = weight.grad
        if self.hebbian.grad is None or grad is None or is_update(grad):
            return False
        return self._left(grad)

    def check_free(self) -> None:
        """Before gradients arrive: they must be added to half of the sums of no backward that
        raised. A reentrant checkpoint's are added to half of those around it."""
        weight = self._weight()
        grad = None if weight is None else weight.grad
        if grad is None:
            around = getattr(self.hebbian, "_ghl_around", -1)
            if around == -1 or around != self._task:
                self.drop()
        elif is_update(grad):
            self._free(grad)

    @torch.no_grad()
    def _free(self, update: Tensor) -> None:
        """Let a gradient that was an update be one again. If it was not zeroed no step may use what
        a backward adds to it, as that of a generator does to its discriminator's."""
        zeroed = is_zeroed(update)
        unmark_update(update)
        self.drop()
        if not zeroed:
            self._incomplete = ADDED

    def follow(self, weight: Tensor) -> None:
        """Before a backward: drop what `weight.grad` says is of an accumulation before, being None
        or all zeros. Within one, views of a bucket of DDP's change each other's versions."""
        grad = weight.grad
        if grad is None:
            if not self._half:
                self.drop()
        elif is_update(grad):
            if not is_unchanged(grad):
                self._free(grad)
        elif not self._left(grad):  # another, or changed in place: zeroed, perhaps
            if self._reason(weight) is not None and not is_owed(weight):
                self.drop()
            self._keep_beside(grad)

    def ended(self, weight: Tensor) -> None:
        """At the end of a backward, when DDP and FSDP have written what they averaged."""
        self._note(weight.grad)

    def _note(self, grad: Tensor | None) -> None:
        if grad is not None and not is_update(grad):
            self._versions, self._grad = versions(grad), weakref.ref(grad)

    def before_step(self, weight: Tensor) -> None:
        """Drop what zeroing in place says to, where no backward has come since to `follow` it.

        An update that was changed is none: DDP writes other ranks' G into it, if this one has no
        gradient. H0 matters beside a gradient of zeros only to a rule that walks without one.
        """
        grad = weight.grad
        if grad is None:
            return
        if is_update(grad):
            if not is_unchanged(grad):
                unmark_update(grad)
        elif self.rule.gate == "hebb" and not self._left(grad):
            self._keep_beside(grad)

    def _left(self, grad: Tensor) -> bool:
        """Whether this is the gradient that the last backward left, as it was."""
        same = self._grad is None or self._grad() is grad
        return same and versions(grad) == self._versions

    def drop(self) -> None:
        """Forget everything that is held."""
        self._check_compiled()
        self.hebbian.grad = self.totals.grad = self.used_in = None
        self._half.clear()
        self._forget()

    def _forget(self) -> None:
        self._incomplete = self._channels_last = None
        self._captured = False

    def _check_compiled(self) -> None:
        """Raise where it is too late to drop sums."""
        if self.hebbian.grad is not None and in_compiled_autograd():
            raise RuntimeError(
                "compiled autograd has taken up the sums of gradients that were zeroed or changed "
                "since: after a zero_grad() without a step call remove() on the handle of "
                "ghl.synchronize, and ghl.synchronize again"
            )

    def _keep_beside(self, grad: Tensor) -> None:
        """Drop what is held if the gradient is all zeros."""
        self._keep(local(grad).any())

    def _keep(self, condition: Tensor) -> None:
        self._check_compiled()
        for leaf in (self.hebbian, self.totals):
            if leaf.grad is not None:
                leaf.grad = leaf.grad.where(condition, 0)

    def lose(self) -> None:
        """What was taken made no update: the gradient that is held has no sums any more."""
        self._incomplete = FAILED

    def take(self) -> Taken:
        """What is held; from then on nothing is."""
        H0, totals = self.hebbian.grad, self.totals.grad
        taken = Taken(H0, totals, self.used_in, H0 is None)
        self.drop()
        return taken
