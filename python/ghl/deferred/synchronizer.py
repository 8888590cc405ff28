"""Updates made once a step, from the sums over all micro-batches and ranks.

The update is then the same however the batch is cut. What is held until then is that of `held.py`.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from ghl import ranks
from ghl.deferred import dtypes, merging, other_optimizers, refusals
from ghl.deferred.groups import wrappers_of
from ghl.deferred.held import HeldSums, capturing, is_owed, note_versions
from ghl.deferred.shards import ShardedSums, is_sharded
from ghl.deferred.wrapped import makes_state, reducers_of, tensors_in
from ghl.guards import is_update
from ghl.hooks import Hook, once_gradients_are_made, watch_optimizers, weak
from ghl.layers import Plastic
from ghl.sums import RawSums, device_of

_of_weight: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # to a weakref of its handle


def handle_of(weight: nn.Parameter) -> Synchronizer | None:
    """The living handle that has this weight."""
    handle = _of_weight.get(weight)
    return None if handle is None else handle()


@torch.compiler.disable
def after_all_callbacks(function: Callable[[], None]) -> None:
    """Have a function called at the end of this backward, behind what DDP and FSDP do there."""
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(lambda: queue(function))


class Synchronizer:
    """The handle that `synchronize` returns."""

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, nn.Parameter],
        optimizer: Optimizer,
        group: Any,
        communicate: torch.dtype | None,
    ) -> None:
        self._weights = weights
        self._group, self._wire = group, communicate
        self._wrappers = weakref.WeakSet(wrappers_of(model))
        self._reducers = weakref.WeakSet(reducers_of(model))
        self._optimizer, self._model = weakref.ref(optimizer), weakref.ref(model)
        self._task, self._lock = -1, threading.Lock()
        self._merges = 0  # on several ranks
        ids = self._ids()
        self._layers = [
            module
            for module in model.modules()
            if isinstance(module, Plastic) and id(module.weight) in ids
        ]
        self._take_over()
        self._attach()
        self._rules = [(layer, layer.rule) for layer in self._layers]
        other_optimizers.living.add(self)
        watch_optimizers(other_optimizers.check_others)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            *self._watch(model),
        ]
        owned = [*map(weakref.ref, weights.values())]
        self._orphaned = weakref.finalize(self, other_optimizers.orphan, owned, self._hooks)
        self._orphaned.atexit = False

    def _take_over(self) -> None:
        """Have sums of these weights held for this handle, whoever had them before."""
        for weight in self._weights.values():
            if (former := handle_of(weight)) is not None:
                former.remove()
        begin = weakref.WeakMethod(self._arrives)

        def checked_begin(sums: HeldSums) -> None:
            if (method := begin()) is None:
                raise RuntimeError(other_optimizers.GONE)
            method(sums)

        for weight in self._weights.values():
            maker: Callable[..., HeldSums] = functools.partial(HeldSums, begin=checked_begin)
            if is_sharded(weight):
                maker = functools.partial(ShardedSums, begin=checked_begin, wire=self._wire)
            _of_weight[weight] = weakref.ref(self)
            other_optimizers.orphans.pop(weight, None)
            RawSums.choose(weight, maker)

    def remove(self) -> None:
        """Make updates in backward again. Raises RuntimeError while gradients await a step."""
        if self._owes():
            raise RuntimeError(
                "gradients are held, of which nothing would make updates any more: call "
                "optimizer.step() or optimizer.zero_grad() before remove()"
            )
        other_optimizers.living.discard(self)
        self._orphaned.detach()
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights.values():
            RawSums.choose(weight, None)
            _of_weight.pop(weight, None)
        self._attach()
        self._weights, self._layers, self._rules = {}, [], []

    def _owes(self) -> bool:
        """Whether gradients await the step that makes updates of them."""
        return any(
            is_owed(weight) or sums.holds(weight) or sums.is_between
            for weight, sums in self._held()
        )

    def may_be_replaced(self, weights: set[int]) -> bool:
        """Whether `synchronize` of these weights, by id, may replace it."""
        live = {id(weight) for weight in self._weights.values() if weight.requires_grad}
        return live <= weights and not self._owes()

    def _is_distributed(self) -> bool:
        return ranks.size(self._group) > 1 or any(map(is_sharded, self._weights.values()))

    def _ids(self) -> set[int]:
        return {id(weight) for weight in self._weights.values()}

    def check_other(self, optimizer: Optimizer) -> None:
        """Raise where an optimizer that does not make updates is about to use gradients."""
        if optimizer is not self._optimizer() and other_optimizers.owes(optimizer, self._ids()):
            raise RuntimeError(
                f"this {type(optimizer).__name__} is about to step with an ordinary gradient, of "
                "which another optimizer's step makes the update: call ghl.synchronize(model, "
                "optimizer) with this one, after remove() on the handle of the other"
            )

    def _ruled(self) -> Iterator[tuple[Plastic, nn.Parameter]]:
        """The layers that still have a rule for one of these weights."""
        ids = self._ids()
        for layer in self._layers:
            weight, rule = layer._parameters.get("weight"), getattr(layer, "_rule", None)
            if weight is not None and id(weight) in ids and rule and rule.makes_update:
                yield layer, weight

    def _attach(self) -> None:
        for layer in self._layers:
            if isinstance(layer, Plastic):  # unswap may have been there
                layer._attach()

    def __repr__(self) -> str:
        sharded = sum(is_sharded(weight) for weight in self._weights.values())
        parts = [f"{len(self._weights)} weights"]
        if sharded:
            parts.append(f"{sharded} of them sharded")
        size = ranks.size(self._group)
        parts.append(f"{size} rank{'s' * (size > 1)}")
        if self._wire is not None:
            parts.append(f"H0 sent as {self._wire}")
        return f"Synchronizer({', '.join(parts)})"

    def _watch(self, model: nn.Module) -> Iterator[Any]:
        """Have every backward begin here at the model's outputs: one that brings this rank no sums
        may still write other ranks' gradients into what was zeroed. And weights that were thawed
        get their sums before FSDP exchanges them for whole ones."""
        watched: list[nn.Module] = [*self._wrappers] or [model]
        for module in watched if self._is_distributed() else ():
            thawed = Hook(weak(self, "_attach_missing"))
            yield module.register_forward_pre_hook(thawed, prepend=True)
            yield module.register_forward_hook(Hook(weak(self, "_after_forward")))

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        for t in tensors_in(output) if torch.is_grad_enabled() else ():
            if t.grad_fn is not None:
                t.grad_fn.register_prehook(weak(self, "_begin"))

    def _attach_missing(self, *call: Any) -> None:
        """Sums for weights that lost theirs while they were frozen, on ranks that use them or not:
        all send the same messages."""
        for layer, weight in self._ruled():
            if weight.requires_grad and RawSums.present(weight) is None:
                layer._attach()

    def _begin(self, *gradients: Any) -> None:
        """Once in a backward, before it adds to gradients: drop what was zeroed."""
        with self._lock:  # devices have threads of their own
            task = torch._C._current_graph_task_id()
            if task != self._task:
                self._attach_missing()
                held = self._held()
                with torch.no_grad():
                    ShardedSums.compare_sizes(held)
                    for weight, sums in held:
                        sums.follow(weight)
                after_all_callbacks(self._ended)
            self._task = task

    def _arrives(self, sums: HeldSums) -> None:
        """Before the first gradient of a weight or of its sums in a backward."""
        self._begin()
        sums.check_free()

    def _ended(self) -> None:
        """At the end of a backward."""
        held = self._held()
        for weight, sums in held:
            sums.ended(weight)
        ShardedSums.note_sizes(held)

    def _held(self) -> list[tuple[nn.Parameter, HeldSums]]:
        """Weights that still have a rule, with their sums."""
        pairs = ((weight, RawSums.present(weight)) for weight in self._weights.values())
        return [(weight, sums) for weight, sums in pairs if isinstance(sums, HeldSums)]

    @torch.compiler.disable
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        check = refusals.before_closure(self._weights.values())
        return once_gradients_are_made(args, kwargs, self.merge, check)

    @torch.compiler.disable
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        """A fused optimizer counts as one who changes gradients, and does not."""
        for weight in self._weights.values():
            if weight.grad is not None and is_update(weight.grad):
                note_versions(weight.grad)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self) -> None:
        """Turn every G that is held into its update, on all ranks together.

        `optimizer.step()` does this; to be called by hand only where something else uses updates.
        """
        held = self._held()
        if not self._weights or (self._is_distributed() and makes_state()):
            return
        if self._is_distributed():
            refusals.check_join(self._wrappers)
        with ranks.together(self._group, device_of(next(iter(self._weights.values())))):
            if self._is_distributed():
                refusals.check_rules(self._rules)
                refusals.check_reducers(self._reducers)
            if self._group is None:
                refusals.check_group(self._weights.values())
            refusals.check_lost(weight for _, weight in self._ruled())
            refusals.check_early(self._optimizer(), self._model())
            if any(sums.rule.gate == "hebb" for _, sums in held):  # H0 counts beside zeros
                ShardedSums.compare_sizes(held)
            for weight, sums in held:
                sums.before_step(weight)
                sums.check(weight)
        if ranks.size(self._group) > 1 and not capturing():
            if (self._merges + 1).bit_count() == 1:
                refusals.check_averaged(self._weights, self._group)
                dtypes.check_agreed(self._weights, self._group)
            self._merges += 1
        try:
            layers = [merging.Layer.of(weight, sums) for weight, sums in held]
            merging.add_up(layers, self._group, self._wire)
            merging.take_off_scale(self._optimizer())
            for layer, update in merging.updates(layers):
                layer.put(update)
        except BaseException:
            for _, sums in held:
                sums.lose()
            raise
