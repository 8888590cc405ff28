"""Turns a model's layers into their ghl counterparts and back, in place.

A layer changes its class and nothing else: the same module object, the same Parameters, hooks,
flags and state_dict keys, whoever holds a reference to it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ghl.layers import Conv2d, Linear, Plastic, check_module, overrides_functions
from ghl.sums import RawSums
from ghl_kernels import Rule

COUNTERPARTS: dict[type[nn.Module], type[Plastic]] = {nn.Conv2d: Conv2d, nn.Linear: Linear}
FORWARDS = ("forward", "_conv_forward")  # that one layer may have in place of its class's
BASES: dict[type[nn.Module], type[nn.Module]] = {c: base for base, c in COUNTERPARTS.items()}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a swap did: rules by name of the layer swapped, reasons by name of those left alone."""

    swapped: dict[str, Rule]
    skipped: dict[str, str]

    def __str__(self) -> str:
        names = [*self.swapped, *self.skipped]
        width = max(map(len, names), default=0)
        lines = [f"{len(self.swapped)} layers swapped, {len(self.skipped)} left as they are"]
        lines += [f"  {name:<{width}}  {rule}" for name, rule in self.swapped.items()]
        lines += [f"  {name:<{width}}  - {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    __repr__ = __str__


def swap(
    model: nn.Module,
    rule: Rule | str = "ghl",
    tau: float | Mapping[str, float] | None = None,
    types: type[nn.Module] | Sequence[type[nn.Module]] = (nn.Conv2d,),
    exclude: Sequence[str] = (),
) -> Report:
    """Train the layers of `model` that are of `types` by `rule`, in place.

    tau: the temperature for all, or {layer name or pattern: tau}, the first that matches a name
    (patterns as in fnmatch); the rule's own where nothing is given or matches.
    types: nn.Conv2d, nn.Linear or both. Subclasses are left alone, but for those of ghl's layers:
        they may compute differently.
    exclude: names or patterns of layers to leave as they are, or of modules that hold them.

    Layers that already have a rule get the new one. A frozen layer is left as it is, also once it
    is thawed: freeze it after the swap, or swap again. Of a weight that other layers use without a
    rule, an nn.Embedding say, G is of all uses and H of the layers that have one.

    Raises ValueError, before anything changes, for a model with nothing to swap, for a name or
    pattern that matches nothing, and for layers that share a weight under different rules;
    TypeError for a model, tau, types or exclude that are of another kind.
    """
    rule = Rule.of(rule)
    check_module(model)
    types = check_types(types)
    exclude = as_names("exclude", exclude)
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, types)}
    named: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        named.setdefault(module, []).append(name)
    if not layers:
        names = " or ".join(t.__name__ for t in types)
        raise ValueError(f"model is {type(model).__name__} without a {names} layer to swap")
    if tau is not None and not isinstance(tau, (Real, Mapping)):
        raise TypeError(f"tau is {tau!r}, must be a number or a {{layer name or pattern: number}}")
    taus = {"*": tau} if isinstance(tau, Real) else dict(tau or {})
    check_patterns("exclude", exclude, [n for names in named.values() for n in names], "module")
    check_patterns("tau", taus, [n for m in layers.values() for n in named[m]], "layer")

    skipped = {n: why for n, m in layers.items() if (why := reason_to_skip(m, named[m], exclude))}
    if nn.Linear in types:
        skipped |= of_functions(modules, exclude)
    swapped = {n: with_tau(rule, named[m], taus) for n, m in layers.items() if n not in skipped}
    if not swapped:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"model is {type(model).__name__} with nothing to swap: {reasons}")
    check_shared(modules, swapped)
    for name in swapped:
        if isinstance(layer := layers[name], Plastic) and layer.rule != swapped[name]:
            layer._detach()  # or layers that share a weight would see each other's old rule
    for name, layer_rule in swapped.items():
        become_plastic(layers[name], layer_rule)
        layers[name].__dict__["_swapped_as"] = name  # errors tell it
    return Report(swapped, skipped)


def unswap(model: nn.Module) -> list[str]:
    """Turn every ghl layer of `model` back into its torch.nn base, in place; returns names.

    A subclass of one, as a parametrization makes it, keeps its class and gets the rule `bp`, and so
    does a layer that was given a forward of its own, which may call our class's. An update in
    weight.grad, to which ordinary gradients must not be added, is dropped.
    """
    check_module(model)
    plastic = [(n, m) for n, m in model.named_modules() if isinstance(m, Plastic)]
    for _, module in plastic:
        base = BASES.get(type(module))
        if base is None or has_own_forward(module):
            module.rule = "bp"
        else:
            forget_rule(module)
            module.__class__ = base  # type: ignore[assignment]
    return [name for name, _ in plastic]


def forget_rule(layer: Any) -> None:
    weight = layer._parameters.get("weight")
    layer._detach()
    layer._drop_update()
    if weight is not None and RawSums.present(weight) is None:
        RawSums.forget(weight)
    for attribute in ("_rule", "_sums", "_swapped_as"):
        layer.__dict__.pop(attribute, None)


def as_names(argument: str, given: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several; of what kind each is, `check_patterns` says."""
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable):
        raise TypeError(f"{argument} is {given!r}, must be names or patterns of them")
    return tuple(given)


def check_types(
    types: type[nn.Module] | Sequence[type[nn.Module]],
) -> tuple[type[nn.Module], ...]:
    if isinstance(types, str) or not isinstance(types, (type, Iterable)):
        raise TypeError(f"types is {types!r}, must be of nn.Conv2d and nn.Linear")
    types = (types,) if isinstance(types, type) else tuple(types)
    for t in types:
        if t not in COUNTERPARTS:
            raise ValueError(f"types has {t!r}, must be of nn.Conv2d and nn.Linear")
    if not types:
        raise ValueError("types is empty, must name nn.Conv2d, nn.Linear or both")
    return types


def check_patterns(
    argument: str, patterns: Sequence[str] | Mapping, names: Sequence[str], kind: str
) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} has {pattern!r}, must have names or patterns of them")
        if not any(fnmatchcase(name, pattern) for name in names):
            nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ValueError(
                f"{argument} has {pattern!r}, which matches no {kind}; "
                f"the nearest is {nearest[0]!r}"
            )


def check_shared(modules: Mapping[str, nn.Module], swapped: Mapping[str, Rule]) -> None:
    """Layers with one weight must agree on the rule, those of an earlier swap included."""
    first: dict[int, tuple[str, Rule]] = {}
    for name, module in modules.items():
        rule = swapped.get(name) or (module.rule if isinstance(module, Plastic) else None)
        weight = module._parameters.get("weight")
        if rule is None or not rule.makes_update or weight is None:
            continue
        other, other_rule = first.setdefault(id(weight), (name, rule))
        if other_rule != rule:
            raise ValueError(
                f"{name!r} would have {rule}, but shares its weight with {other!r}, "
                f"which has {other_rule}"
            )


def other_kind(module: nn.Module) -> str:
    """What is said of a layer of another class than torch.nn's or ours."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return f"is a {name}, which may compute differently from its base"


def is_excluded(names: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a module of these names is, or one that holds it."""
    parts = [name.split(".") for name in names]
    holders = [".".join(some[:n]) for some in parts for n in range(1, len(some) + 1)]
    return any(fnmatchcase(holder, pattern) for holder in holders for pattern in exclude)


def reason_to_skip(module: nn.Module, names: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why a layer, which may have several names, is left as it is; None when it can be swapped."""
    if is_excluded(names, exclude):
        return "excluded"
    weight = module._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        return "is not initialized yet"
    if type(module) not in COUNTERPARTS and not isinstance(module, Plastic):
        return other_kind(module)
    if type(module) in COUNTERPARTS and has_own_forward(module):
        return "has a forward of its own, which may compute differently"
    if weight is None:
        return "its weight is not a Parameter"
    if not weight.is_floating_point():
        return f"its weight is of {weight.dtype}"
    if overrides_functions(weight):
        return f"its weight is a {type(weight).__name__}, which overrides what functions do with it"
    if not weight.requires_grad:
        return "its weight is frozen"
    return None


def has_own_forward(module: nn.Module) -> bool:
    return not vars(module).keys().isdisjoint(FORWARDS)


def of_functions(modules: Mapping[str, nn.Module], exclude: Sequence[str]) -> dict[str, str]:
    """What attention computes without a layer, and why it is left as it is."""
    function = "is computed by a function, not by a layer"
    return {
        f"{name}.in_proj".lstrip("."): "excluded" if is_excluded([name], exclude) else function
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
    }


def with_tau(rule: Rule, names: Sequence[str], taus: Mapping[str, float]) -> Rule:
    for pattern, tau in taus.items():
        if any(fnmatchcase(name, pattern) for name in names):
            return rule.replace(tau=tau)
    return rule


def become_plastic(module: nn.Module, rule: Rule) -> None:
    if type(module) in COUNTERPARTS:
        module.__class__ = COUNTERPARTS[type(module)]
    assert isinstance(module, Plastic)
    module._set_rule(rule)
