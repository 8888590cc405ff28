"""One weight's raw sums (G, H0, totals), and the one merge that ends a backward.

The sums are linear in the data, the merge is not: however often a layer is used in a forward,
autograd adds its sums, and the update is made where gradients of a weight have been accumulated.
H0 and totals ride through autograd as gradients of two leaves that own no memory. Sums that
outlive a backward are `ghl.deferred.held`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ghl.guards import check_alone, is_update, mark_update
from ghl.hooks import put_behind
from ghl_kernels import Rule
from ghl_kernels.checks import sum_dtype
from ghl_kernels.composed import sign
from ghl_kernels.layout import is_channels_last

_of_weight: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_makers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # where not ImmediateSums


def register_first(weight: Tensor, hook: Any) -> Any:
    """Register a post-accumulate-grad hook before those that weight has: they see the update."""
    handle = weight.register_post_accumulate_grad_hook(hook)
    put_behind(handle, ())
    return handle


def device_of(weight: Tensor) -> torch.device:
    """Where the forward uses the weight; an offloaded shard lies elsewhere."""
    mesh = getattr(weight, "device_mesh", None)
    return weight.device if mesh is None else torch.empty(0, device=mesh.device_type).device


def described(weight: Tensor) -> str:
    """Its shape, and where `ghl.swap` found a layer that has it."""
    sums = RawSums.latest(weight)
    layers = [] if sums is None else list(sums.layers)
    names = {n for layer in layers if (n := layer.__dict__.get("_swapped_as"))}
    return " ".join([*map(repr, sorted(names)), str(tuple(weight.shape))])


NO_TASK = -2  # autograd's own for that is -1
TOLD = 4  # weights that an error names

CHANGED = (
    "a layer was synchronized, converted or given another rule between a forward and its backward, "
    "whose sums would be lost: do that before the forward"
)

TRANSFORMED = (
    "backward() reached the weight of a layer with a rule through a transform of torch.func (vmap, "
    "grad, jacrev), within which a layer is its base and makes no H0: call the layer outside of "
    "transforms, or use ghl.unswap or rule='bp' here"
)
TAKEN = (
    "was used before it held the update (by DistributedDataParallel, or an optimizer's step within "
    "backward): under torch.compile H0 may arrive after the gradient; call ghl.synchronize(model, "
    "optimizer) once before training, or run these layers without torch.compile"
)


def without_sums(weights: Sequence[Tensor]) -> str:
    """What is said of weights with a gradient that must not pass for an update."""
    names = [described(weight) for weight in weights[:TOLD]]
    more = f" and {len(weights) - TOLD} others" if len(weights) > TOLD else ""
    return (
        f"weight.grad of {', '.join(names)}{more} holds an ordinary gradient, because no layer "
        "with a rule gave the sums for an update: call backward() without inputs=, use the weight "
        "through its layer, not a trace of it, and let a penalty on gradients share the backward "
        "of a loss (or give the layer rule='bp', or leave it out of the swap: exclude=['*attn*'] "
        "where attention uses weights without calling their layers)"
    )


class RawSums:
    """The sums of one weight, shared by all layers that have it; a subclass says when they merge.

    hebbian (out_channels, rest) and totals (out_channels + 1) are leaves whose gradients are H0,
    in the memory order of the weight, and the sums of u with the number of rows; totals is None
    where these sums do without. With hebbian goes what a forward and its backward must tell these
    sums, which they may not know: `_ghl_weight`, a weak reference to the weight, and of the latest
    eager backward that made a pair `_ghl_paired`, its autograd task, `_ghl_dtype`, that of its
    forward, and `_ghl_around`, the task that forward was recomputed in, or -1.
    compute_dtype, channels_last: the dtype and memory order in which the latest forward used the
    weight.
    """

    sharded = False  # whether forwards see another tensor than the weight
    held = False  # until a step, by ghl.synchronize

    def __init__(self, weight: nn.Parameter, rule: Rule) -> None:
        self.rule = rule
        # a string: torch.compile may make a number a symbol, which no two functions can share
        self.tau = repr(rule.tau)
        self.live = True
        self.layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.compute_dtype = weight.dtype
        self.channels_last: bool | None = None
        self.transformed = NO_TASK  # the backward that last came through a transform of torch.func
        self._weight = weakref.ref(weight)
        self._maker: Callable[..., RawSums] = _makers.get(weight, ImmediateSums)
        self._hooks: list[Any] = []

        options: dict[str, Any] = {"dtype": sum_dtype(weight.dtype), "device": device_of(weight)}
        number = torch.zeros((), **options)
        out_channels, *rest = weight.shape
        self.hebbian = number.expand(out_channels, torch.Size(rest).numel()).requires_grad_()
        self.totals: Any = number.expand(out_channels + 1).requires_grad_()
        self.hebbian._ghl_weight = weakref.ref(weight)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict) -> None:
        """None: a copy of a layer makes sums of its own weight. A parametrized one copies all that
        it has, whatever Plastic.__getstate__ says."""

    @classmethod
    def of(cls, weight: nn.Parameter, rule: Rule, layer: nn.Module) -> RawSums:
        """The sums of `weight`, shared by all layers that have it; they must agree on the rule."""
        sums = _of_weight.get(weight)
        if sums is None or not sums.serves(weight, rule):
            if sums is not None:
                others = [other for other in sums.layers if other is not layer]
                if sums.rule != rule and others:
                    raise ValueError(
                        f"rule is {rule}, but another layer has the same weight and {sums.rule}: "
                        "ghl.swap(model, rule) gives all layers one"
                    )
                sums.release()
            sums = _of_weight[weight] = _makers.get(weight, ImmediateSums)(weight, rule)
        sums.layers.add(layer)
        return sums

    @staticmethod
    def present(weight: nn.Parameter) -> RawSums | None:
        """The sums that `weight` has now, if any layer collects them."""
        sums = _of_weight.get(weight)
        return sums if sums is not None and sums.live else None

    @staticmethod
    def forget(weight: nn.Parameter) -> None:
        """Let nothing of released sums refer to `weight`."""
        _of_weight.pop(weight, None)

    @staticmethod
    def latest(weight: Tensor) -> RawSums | None:
        """The sums that `weight` has or had last."""
        return _of_weight.get(weight)

    @staticmethod
    def choose(weight: nn.Parameter, maker: Callable[..., RawSums] | None) -> None:
        """How sums of `weight` are made when a layer attaches next; None for ImmediateSums."""
        if maker is not None:
            _makers[weight] = maker
        else:
            _makers.pop(weight, None)

    def serves(self, weight: nn.Parameter, rule: Rule) -> bool:
        """Whether these sums still fit the weight, which `module.to()` may have changed."""
        return (
            self.live
            and self.rule == rule
            and self._maker is _makers.get(weight, ImmediateSums)
            and self.channels_last in (None, is_channels_last(weight))
            and self.fits(weight)
        )

    def is_of(self, weight: Tensor) -> bool:
        return self._weight() is weight

    def fits(self, weight: Tensor) -> bool:
        """Whether they are as those of the weight would be: `weight.data = ...` may change it."""
        leaf = self.hebbian
        return (
            leaf.shape == (weight.shape[0], weight.shape[1:].numel())
            and leaf.dtype == sum_dtype(weight.dtype)
            and leaf.device == device_of(weight)
        )

    @property
    def is_polluted(self) -> bool:
        """Whether a backward has added to an update: what weight.grad has then is of no use."""
        return False

    def dtype_of_pair(self) -> torch.dtype:
        """In which the forward used the weight whose sums arrive: the backward of an eager one has
        left it with the leaf (`functional.note_pair`); of a compiled one the latest is taken."""
        task = torch._C._current_graph_task_id()
        if getattr(self.hebbian, "_ghl_paired", -1) == task != -1:
            return getattr(self.hebbian, "_ghl_dtype", self.compute_dtype)
        return self.compute_dtype

    def release(self) -> None:
        """Take the hooks off: `weight.grad` is the ordinary gradient again."""
        self.live = False
        for hook in self._hooks:
            hook.remove()


def check_pair(hebbian: Tensor, used: Tensor) -> None:
    """Raise where a pair's H0 would go to sums that the weight has no more, or in an order of
    memory that it has no more. hebbian: the leaf of the forward; used: the weight as it was then.
    """
    weight = hebbian._ghl_weight()  # type: ignore[attr-defined]
    if weight is None or hasattr(weight, "device_mesh"):
        return
    present = RawSums.present(weight)
    replaced = present is not None and present.hebbian is not hebbian
    if replaced or is_channels_last(weight) != is_channels_last(used):
        raise RuntimeError(CHANGED)


class ImmediateSums(RawSums):
    """Turns `weight.grad` from G into the update in every backward, as soon as all has arrived."""

    def __init__(self, weight: nn.Parameter, rule: Rule) -> None:
        super().__init__(weight, rule)
        self._task = -1
        self._arrived: dict[str, Tensor] = {}
        if rule.decay != "instar" and rule.normalize != "mean":  # no use for them
            self._no_totals, self.totals = torch.zeros_like(self.totals), None
        leaves = {"H0": self.hebbian, "totals": self.totals}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        self._awaited = {"G", *leaves} if rule.needs_hebbian else {"G"}
        # on the device: whether weight.grad had numbers when this backward began
        self._before: Tensor | None = None
        # whether weight.grad may hold an update, or what was there before these sums
        self._handed_out = weight.grad is not None
        self._added = NO_TASK  # the backward in which a gradient is: hooks come after none, too
        self._versions = 0, 0  # of G and the weight, where G has come before H0
        self._late: tuple[Tensor, int] | None = None  # the update then, as it was made
        owner = weakref.ref(self)

        @unserializable_hook
        def look(gradient: Tensor | None) -> None:
            if (sums := owner()) is not None and gradient is not None:
                sums._look()

        self._hooks = [
            weight.register_hook(look),
            register_first(weight, self._take_gradient),
        ]
        for name, leaf in leaves.items():
            self._hooks.append(leaf.register_post_accumulate_grad_hook(self._take(name)))

    def _take(self, name: str) -> Any:
        owner = weakref.ref(self)  # a leaf and its owner in a cycle would never be collected

        def take(leaf: Tensor) -> None:
            sums, leaf.grad = leaf.grad, None
            collector = owner()
            weight = collector._weight() if collector is not None else None
            if collector is not None and weight is not None and sums is not None:
                if not weight.requires_grad:  # frozen since the forward: no G comes either
                    return
                collector._check_no_update(weight)
                collector._arrive(name, sums)

        return take

    def _look(self) -> None:
        """Before a gradient is added: to what. None costs nothing."""
        self._added = torch._C._current_graph_task_id()
        weight = self._weight()
        grad = None if weight is None else weight.grad
        self._before = None
        if grad is None:
            self._handed_out = False
        elif self._handed_out and not is_update(grad):
            self._before = grad.detach().any()

    def _take_gradient(self, weight: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if weight.grad is None or not weight.requires_grad or task != self._added:  # of nothing
            return
        self._check_no_update(weight)
        before, self._before = self._before, None
        if not self.layers:
            return
        if before is not None and before:
            self._refuse(
                "a copy of an update, or a gradient of before its rule or of a failed backward,"
            )
        self._handed_out = True  # also if this backward ends with an error
        if self.transformed == task:
            raise RuntimeError(TRANSFORMED)
        check_alone(weight)
        self._arrive("G", weight.grad)
        if not self._arrived:
            return
        self._versions = weight.grad._version, weight._version
        if len(weight._post_accumulate_grad_hooks) > 1:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"weight {described(weight)} has a post-accumulate-grad hook of its own, which "
                "would see the ordinary gradient: under torch.compile sums may arrive after the "
                "gradient; run this layer without torch.compile, or use the update after backward()"
            )
        torch.autograd.Variable._execution_engine.queue_callback(self._check_complete)

    def _check_no_update(self, weight: Tensor) -> None:
        if is_update(weight.grad):
            self._refuse("an update")

    def _refuse(self, held: str) -> None:
        weight = self._weight()
        whose = "" if weight is None else f"of {described(weight)} "
        raise RuntimeError(
            f"weight.grad {whose}already held {held} when another backward reached it, and "
            "updates must not be added: call optimizer.zero_grad() (set_to_none=True, the default) "
            "before every backward, or for gradient accumulation call ghl.synchronize(model, "
            "optimizer) once before training; a weight that the optimizer does not have wants "
            "model.zero_grad(), requires_grad_(False) or rule='bp' (a reentrant checkpoint is a "
            "backward of its own)"
        )

    def _check_complete(self) -> None:
        """At the end of a backward in which G was first: gradients without sums must not pass for
        updates, nor what DDP writes back, having seen G; it does so in a callback as this is."""
        if self._late is not None:
            torch.autograd.Variable._execution_engine.queue_callback(self._check_kept)
        if "G" not in self._arrived:
            return
        found = [
            weight
            for weight, sums in list(_of_weight.items())
            if isinstance(sums, ImmediateSums) and sums._task == self._task and sums._take_bare()
        ]
        if found:
            raise RuntimeError(without_sums(found))

    def _take_bare(self) -> bool:
        """Whether G has come alone, which is then forgotten. That of a weight which its layers have
        given away is an ordinary gradient again."""
        weight = self._weight()
        owned = any(layer._parameters.get("weight") is weight for layer in self.layers)
        alone = self._arrived.pop("G", None) is not None
        self._handed_out &= owned or not alone
        return alone and weight is not None and owned

    def _arrive(self, name: str, sums: Tensor) -> None:
        """Sums of an earlier backward that never finished are dropped, not mixed in."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._arrived = task, {}
        self._arrived[name] = sums
        weight = self._weight()
        if weight is not None and self._awaited <= self._arrived.keys():
            if self.channels_last not in (None, is_channels_last(weight)):
                raise RuntimeError(CHANGED)  # check_pair does not see it of a compiled graph
            arrived, self._arrived = self._arrived, {}
            if name != "G":
                self._check_unused(weight, arrived["G"])
            update = weight.grad = self._merge(weight.detach(), arrived)
            if name != "G":
                self._late = update, update._version

    def _check_unused(self, weight: Tensor, G: Tensor) -> None:
        """H0 has come after G: hooks of the node that accumulates have seen G, and nobody can tell
        what hooks a node has."""
        if weight.grad is not G or (G._version, weight._version) != self._versions:
            raise RuntimeError(f"weight.grad of {described(weight)} {TAKEN}")

    def _check_kept(self) -> None:
        """Behind what DDP does at the end of such a backward."""
        late, self._late = self._late, None
        weight = self._weight()
        if late is None:
            return
        update, version = late
        if weight is not None and weight.grad is update and update._version != version:
            raise RuntimeError(f"weight.grad of {described(weight)} {TAKEN}")

    def _merge(self, weight: Tensor, sums: dict[str, Tensor]) -> Tensor:
        """The update, which no graph has part in. weight: detached."""
        rule, G = self.rule, sums["G"]
        if not rule.needs_hebbian:
            update = sign(G.detach())
        else:
            totals = self._no_totals if self.totals is None else sums["totals"]
            update = torch.ops.ghl_kernels.merge_no_grad(
                G, sums["H0"], totals, weight, rule.decay, rule.gate, rule.normalize,
                self.dtype_of_pair(),
            )[0]  # fmt: skip
        mark_update(update)
        self._handed_out = True
        return update
