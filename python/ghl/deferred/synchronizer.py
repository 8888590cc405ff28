"""`ghl.synchronize`: updates made once a step, from the sums over all micro-batches and ranks.

The update is then the same however the batch is cut. What is held until then is that of `held.py`.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ghl import ranks
from ghl.deferred import merging, others, refusals
from ghl.deferred.groups import check_one_group, group_of, wrappers_of
from ghl.deferred.held import HeldSums, capturing, is_owed, note_versions
from ghl.deferred.shards import ShardedSums, is_on_neurons, is_sharded
from ghl.deferred.wrapped import check_wrapper, is_managed, reducers_of, stepping
from ghl.guards import is_update
from ghl.hooks import Hook, once_gradients_are_made, weak
from ghl.layers import Plastic
from ghl.sums import RawSums, device_of
from ghl_kernels.layout import is_channels_last

_of_weight: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # to a weakref of its handle
WIRES = (None, torch.float32, torch.bfloat16)


def synchronize(
    model: nn.Module,
    optimizer: Optimizer,
    group: Any = None,
    communicate: torch.dtype | None = None,
) -> Synchronizer:
    """Make the updates of `model` in `optimizer.step()`, from all backwards and ranks before it.

    Call it once, on every rank, when the model is wrapped (DistributedDataParallel) or sharded
    (fully_shard) and its optimizer built. Until the step `weight.grad` is the ordinary gradient
    G, so whatever is done with that works as ever: accumulation over backwards with or without
    no_sync, averaging over ranks, GradScaler, clipping (of G, whose size does not reach the
    update). A hook before the step adds H0 and totals up over the ranks, merges all layers, and
    puts the updates into `weight.grad`. zero_grad() drops what is held, also without a step.

    optimizer: the one that steps, or what accelerate or Lightning have put around it.
    group: the process group whose ranks hold parts of one batch: that of DistributedDataParallel
    where `model` is or has one, else the default group. Its ranks must have the same layers, and
        average the gradients of all weights, and step together; that they do is looked at in the
        steps 1, 2, 4, 8 and so on.
        Sharded weights are added up over their own mesh.
    communicate: torch.bfloat16 halves the bytes of H0 on the wire, at a relative error of about
    2⁻⁸ for every rank's summand; totals are sent as they are.

    On the wire, for a weight of K neurons and N numbers, in float32: 4N + 4(K+1) bytes once a
    step beside DistributedDataParallel's 4N for every G that it averages; 4N + 8K beside FSDP's
    for every reduction of G, and 4 for absmax a step; 4 more tell whether a rank has an error,
    which is then one of all. It is no DDP communication hook: a compiled backward gives G and H0 in
    no set order, so H0 may not be there when a bucket is full; with no_sync H0 would be sent once
    too often; and the one hook that DDP takes stays the user's.

    Only zero_grad(), `weight.grad = None` and zeroing in place drop what is held: nothing tells of
    `weight.grad.data.zero_()`, and a gradient of zeros that is changed in place counts as zeroed.
    The decay is taken of the weight as it is in the step. Gradients must not be taken away and
    added back (as PCGrad does), nor be made by backward(inputs=) or autograd.grad. A forward counts
    as often as backwards go through it (retain_graph=True). An optimizer that uses gradients before
    it calls its closure, as SAM does, wants merge() on the handle before its step. Of a CUDA graph,
    forward, backward and step must be in the same one. Another optimizer's step raises while
    gradients are held; synchronize again, when none are, replaces the former.

    Over several ranks a hook on `model` (not if that is compiled) tells where a backward begins;
    remove() comes before another rule; model.join() is refused, as one that has joined would not
    add its sums; get_optimizer_state_dict of torch.distributed.checkpoint, which steps an optimizer
    that has no state, is to be called on all.
    Returns a handle: `remove()` takes all hooks off, and the updates are made in backward again.
    Raises TypeError for what is no optimizer; ValueError where there is nothing to synchronize, or
    FullyShardedDataParallel or tensor parallelism; RuntimeError for weights that already are, and
    on all ranks where they differ in layers, dtypes, rules or `communicate`.
    """
    wanted, group = group, group_of(model, group)
    weights: dict[str, nn.Parameter] = {}
    try:
        optimizer = stepping(optimizer)
        if communicate not in WIRES:
            raise ValueError(f"communicate is {communicate}, must be one of {WIRES}")
        check_wrapper(model)
        weights = weights_of(model, optimizer, ranks.size(group) > 1)
        if wanted is None:
            check_one_group(model, weights)
        found = [
            f"{name!r}: {tuple(w.shape)} {w.dtype} {order_of(w)} {model.get_submodule(name).rule}"
            for name, w in weights.items()
        ] + [f"communicate={communicate}"]
    except (TypeError, ValueError, RuntimeError) as error:
        ranks.check_same([f"the error {error}"], group)
        raise
    ranks.check_same(found, group)
    return Synchronizer(model, weights, optimizer, group, communicate)


def order_of(weight: nn.Parameter) -> str:
    """The memory order in which a weight's H0 is sent."""
    return "channels_last" if is_channels_last(weight) else "contiguous"


def handle_of(weight: nn.Parameter) -> Synchronizer | None:
    """The living handle that has this weight."""
    handle = _of_weight.get(weight)
    return None if handle is None else handle()


def weights_of(
    model: nn.Module, optimizer: Optimizer, averaged: bool = False
) -> dict[str, nn.Parameter]:
    """Weights of layers with a rule that `optimizer` trains, by name, each once.

    Frozen ones may be thawed: they are among them where they can be.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in model.named_modules():
        ruled = isinstance(module, Plastic) and module.rule.gate != "gradient"
        if ruled and id(module.weight) in trained:
            found.setdefault(id(module.weight), (name, module.weight))
    replaced = {handle_of(weight) for _, weight in found.values() if weight.requires_grad}
    weights = {
        name: weight
        for name, weight in found.values()
        if weight.requires_grad
        or (handle_of(weight) in (None, *replaced) and may_be_thawed(weight, averaged))
    }
    if not weights:
        raise ValueError(
            f"model is {type(model).__name__} without a weight that a rule and the optimizer "
            "train; swap, wrap or shard the model first, then build the optimizer"
        )
    ids = {id(weight) for weight in weights.values()}
    for name, weight in weights.items():
        if is_sharded(weight) and not is_managed(model, name):
            raise ValueError(
                f"weight of {name!r} is a DTensor that fully_shard has not made (tensor "
                "parallelism?), which is not supported: give the layer rule='bp'"
            )
        former = handle_of(weight)
        if former is not None and not former.may_be_replaced(ids):
            raise RuntimeError(
                f"weight of {name!r} is synchronized already, with others or with gradients that "
                "await a step: call zero_grad(), or remove() on that handle, first"
            )
    return weights


def may_be_thawed(weight: nn.Parameter, averaged: bool) -> bool:
    """Not where DistributedDataParallel averages gradients, which leaves out what was frozen."""
    return is_on_neurons(weight) if isinstance(weight, DTensor) else not averaged


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
        others.living.add(self)
        others.watch_optimizers()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            *self._watch(model),
        ]
        owned = [*map(weakref.ref, weights.values())]
        self._orphaned = weakref.finalize(self, others.orphan, owned, self._hooks)
        self._orphaned.atexit = False

    def _take_over(self) -> None:
        """Have sums of these weights held for this handle, whoever had them before."""
        for weight in self._weights.values():
            if (former := handle_of(weight)) is not None:
                former.remove()
        begin = weakref.WeakMethod(self._arrives)

        def checked_begin(sums: HeldSums) -> None:
            if (method := begin()) is None:
                raise RuntimeError(others.GONE)
            method(sums)

        for weight in self._weights.values():
            maker: Callable[..., HeldSums] = functools.partial(HeldSums, begin=checked_begin)
            if is_sharded(weight):
                maker = functools.partial(ShardedSums, begin=checked_begin, wire=self._wire)
            _of_weight[weight] = weakref.ref(self)
            others.orphans.pop(weight, None)
            RawSums.choose(weight, maker)

    def remove(self) -> None:
        """Make updates in backward again. Raises RuntimeError while gradients await a step."""
        if self._owes():
            raise RuntimeError(
                "gradients are held, of which nothing would make updates any more: call "
                "optimizer.step() or optimizer.zero_grad() before remove()"
            )
        others.living.discard(self)
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
        if optimizer is not self._optimizer() and others.owes(optimizer, self._ids()):
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
            if weight is not None and id(weight) in ids and rule and rule.gate != "gradient":
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
        for t in tree_leaves(output) if torch.is_grad_enabled() else ():
            if isinstance(t, Tensor) and t.grad_fn is not None:
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

    @torch.no_grad()
    def merge(self) -> None:
        """Turn every G that is held into its update, on all ranks together.

        `optimizer.step()` does this; to be called by hand only where something else uses updates.
        """
        if not self._weights:  # removed
            return
        if self._is_distributed():
            refusals.check_join(self._wrappers)
        held = self._held()
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
        merging.settle_dtypes(held)
        if ranks.size(self._group) > 1 and not capturing():
            if (self._merges + 1).bit_count() == 1:
                refusals.check_alike(self._weights, self._group)
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
