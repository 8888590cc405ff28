"""From the sums of weights to their updates: one merge for all that share a rule.

Nothing here knows when sums are complete, or where an update goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ghl_kernels import Rule
from ghl_kernels.composed import sign
from ghl_kernels.layout import is_channels_last


class Summed(Protocol):
    """What a merge is of: H0 (out_channels, rest) in the memory order of the weight, and the weight
    as the forward used it. H0 and totals are None only where the rule needs nothing but G."""

    @property
    def rule(self) -> Rule: ...
    @property
    def G(self) -> Tensor: ...
    @property
    def H0(self) -> Tensor | None: ...
    @property
    def totals(self) -> Tensor | None: ...
    @property
    def used(self) -> Tensor: ...


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


def merged(layers: Sequence[Summed], rule: Rule, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What the merge gives for each layer under the decay, gate and normalisation of `rule`."""
    if rule.gate == "sign_only":
        return [sign(layer.G) for layer in layers]
    used = [layer.used for layer in layers]
    H0 = [layer.H0 for layer in layers if layer.H0 is not None]
    return torch.ops.ghl_kernels.foreach_merge(
        [layer.G.to(dtype or layer.G.dtype) for layer in layers],
        [from_rows(rows, weight) for rows, weight in zip(H0, used, strict=True)],
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
