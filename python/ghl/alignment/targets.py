"""Which weights of a model can be measured, and why the others cannot.

A target is one weight, under the names of all the layers that have it; what happens to it in a
step is in `sums.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from ghl.layers import Conv2d, Linear, Plastic
from ghl.swap import other_kind

LAYERS = (nn.Linear, nn.Conv2d, Linear, Conv2d)
NO_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
PROJECTIONS = ("in_proj", "q_proj", "k_proj", "v_proj")


@dataclass(eq=False)
class Target:
    """One weight that may be measured.

    names: the layers that have it, `attention.in_proj` for a projection without a module of its
    own. gap: why it cannot be measured at all, None if it can.
    """

    names: list[str]
    module: nn.Module
    weight: nn.Parameter | None
    gap: str | None = None
    classes: dict[nn.Module, type[nn.Module]] = field(default_factory=dict)

    @property
    def ruled(self) -> bool:
        """Whether `weight.grad` holds the update of a rule instead of the gradient."""
        return isinstance(self.module, Plastic) and self.module.rule.makes_update

    def swapped_since(self) -> bool:
        """Whether a layer has changed its class since the Monitor was attached."""
        return any(type(module) is not kind for module, kind in self.classes.items())


def find_targets(model: nn.Module) -> list[Target]:
    """The weights of all linear layers, convolutions and attention projections of a model.

    A weight that several layers have is one target. Raises ValueError if there are none.
    """
    targets: dict[int, Target] = {}
    without: list[Target] = []
    inside_attention: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.add(id(module.out_proj))
            found = attention_weights(name, module)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and id(module) not in inside_attention:
            found = iter([(name, module, module._parameters.get("weight"))])
        else:
            continue
        for layer, owner, weight in found:
            gap = reason_not_measurable(owner, weight)
            if weight is None:
                without.append(Target([layer], owner, None, gap, {owner: type(owner)}))
                continue
            target = targets.setdefault(id(weight), Target([], owner, weight, gap))
            target.names.append(layer)
            target.classes[owner] = type(owner)
    if not targets and not without:
        raise ValueError(
            f"model is {type(model).__name__} without a layer to measure, must have an nn.Linear, "
            "nn.Conv2d or nn.MultiheadAttention"
        )
    for name, module in model.named_modules():
        note_unseen_uses(name, module, targets)
    others = list(of_other_kinds(model, targets))
    return [*targets.values(), *without, *others]


def of_other_kinds(model: nn.Module, targets: Mapping[int, Target]) -> Iterator[Target]:
    """Gaps for layers that multiply too, but in a way of their own: nn.Conv1d, transformers'
    Conv1D, adapters, every weight of an nn.LSTM."""
    for name, module in model.named_modules():
        if isinstance(module, (*LAYERS, *NO_PRODUCTS)):
            continue
        gap = f"is a {type(module).__name__}, a kind of layer that is not measured"
        for parameter, weight in module._parameters.items():
            if weight is None or not parameter.startswith("weight") or is_lazy(weight):
                continue
            if weight.dim() > 1 and id(weight) not in targets:
                own = name if parameter == "weight" else f"{name}.{parameter}".lstrip(".")
                yield Target([own], module, weight, gap, {module: type(module)})


def attention_weights(
    name: str, module: nn.MultiheadAttention
) -> Iterator[tuple[str, nn.Module, nn.Parameter | None]]:
    """Each projection of an attention layer; the packed one is one layer of 3 embed_dim neurons."""
    prefix = f"{name}." if name else ""
    for projection in PROJECTIONS:
        weight = module._parameters.get(f"{projection}_weight")
        if weight is not None:
            yield f"{prefix}{projection}", module, weight
    yield f"{prefix}out_proj", module, module.out_proj._parameters.get("weight")


def reason_not_measurable(module: nn.Module, weight: nn.Parameter | None) -> str | None:
    if hasattr(weight, "device_mesh"):
        return "its weight is sharded"
    if weight is not None and not is_lazy(weight) and (weight.is_complex() or not weight.numel()):
        return f"its weight is {tuple(weight.shape)} {weight.dtype}: there is no cosine"
    if not isinstance(module, nn.MultiheadAttention) and type(module) not in LAYERS:
        return other_kind(module)
    if weight is None:
        return "its weight is not a Parameter (a parametrization?)"
    if is_lazy(weight):
        return "its weight is not initialized yet: attach the Monitor after a first forward"
    if not weight.requires_grad:
        return "its weight is frozen"
    return None


def note_unseen_uses(name: str, module: nn.Module, targets: dict[int, Target]) -> None:
    """A weight that another kind of module has too gets gradients that no hook sees."""
    for parameter in module._parameters.values():
        target = targets.get(id(parameter)) if parameter is not None else None
        if target is None or target.gap or module in target.classes:
            continue
        if isinstance(target.module, nn.MultiheadAttention) and module is target.module.out_proj:
            continue
        target.gap = (
            f"its weight is shared with {name!r} ({type(module).__name__}), whose part in the "
            "learning signal is not seen"
        )
