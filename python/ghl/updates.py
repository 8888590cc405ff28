"""From the sums of weights to their updates: one merge for all that share a rule.

Nothing here knows when sums are complete, or where an update goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ghl_kernels import Rule, ops
from ghl_kernels.composed import sign
from ghl_kernels.layout import is_channels_last


class Summed(Protocol):
    """What a merge is of: H0 (out_channels, rest) in the memory order of the weight, the weight or
    this rank's part of it, without a graph, and the dtype in which the forward used it. H0 and
    totals are None only where the rule needs nothing but G."""

    @property
    def rule(self) -> Rule: ...
    @property
    def G(self) -> Tensor: ...
    @property
    def H0(self) -> Tensor | None: ...
    @property
    def totals(self) -> Tensor | None: ...
    @property
    def here(self) -> Tensor: ...
    @property
    def compute_dtype(self) -> torch.dtype: ...


Sums = TypeVar("Sums", bound=Summed)


def as_rows(t: Tensor, channels_last: bool) -> Tensor:
    """(out_channels, rest) in the memory order of a weight: a view of a t with its strides."""
    rows = t.movedim(1, -1) if channels_last else t
    return rows.reshape(t.shape[0], t.shape[1:].numel())


def from_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `as_rows`: a view with the shape of `weight`."""
    if not is_channels_last(weight):
        return rows.view(weight.shape)
    out_channels, channels, *kernel_size = weight.shape
    return rows.view(out_channels, *kernel_size, channels).movedim(-1, 1)


def as_used(layers: Sequence[Summed]) -> list[Tensor]:
    """The weights as the forward used them, rounded in one launch."""
    weights = [layer.here for layer in layers]
    used = [
        w if w.dtype == layer.compute_dtype else torch.empty_like(w, dtype=layer.compute_dtype)
        for w, layer in zip(weights, layers, strict=True)
    ]
    rounded = [i for i, (u, w) in enumerate(zip(used, weights, strict=True)) if u is not w]
    if rounded:
        torch._foreach_copy_([used[i] for i in rounded], [weights[i] for i in rounded])
    return used


def merged(layers: Sequence[Summed], rule: Rule, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What the merge gives for each layer under the decay, gate and normalisation of `rule`."""
    if rule.gate == "sign_only":
        return [sign(layer.G) for layer in layers]
    used = as_used(layers)
    H0 = [layer.H0 for layer in layers if layer.H0 is not None]
    return ops.direct["foreach_merge"](
        [layer.G if dtype is None else layer.G.to(dtype) for layer in layers],
        [from_rows(rows, layer.here) for rows, layer in zip(H0, layers, strict=True)],
        [layer.totals for layer in layers],
        used, rule.decay, rule.gate, rule.normalize,
    )[0]  # fmt: skip


def updates(layers: Sequence[Sums]) -> Iterator[tuple[Sums, Tensor]]:
    """Every layer with its update: one operation for all that share a rule, in no set order."""
    alike: dict[Any, list[Sums]] = {}
    for layer in layers:
        rule, G = layer.rule, layer.G
        key = rule.decay, rule.gate, rule.normalize, G.dtype, G.device
        alike.setdefault(key, []).append(layer)
    for same in alike.values():
        yield from zip(same, merged(same, same[0].rule), strict=True)
