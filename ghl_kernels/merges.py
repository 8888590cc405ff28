"""From sums and weights to kernels that merge them, and back: what every GPU implementation shares.

Which kernel fills a layer's results is an implementation's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghl_kernels import composed
from ghl_kernels.checks import FLOATS
from ghl_kernels.composed import Triple, Triples
from ghl_kernels.layout import empty_rows, in_order_of, like_weight


class Layer(NamedTuple):
    """One layer's tensors in the memory order of its weight, and the memory of its results.

    scratch (2, K): each neuron's decay and max|H|.
    """

    G: Tensor
    H0: Tensor
    totals: Tensor
    w: Tensor
    scratch: Tensor
    neurons: Tensor
    update: Tensor
    layer: Tensor

    @classmethod
    def of(
        cls,
        G: Tensor,
        H0: Tensor,
        totals: Tensor,
        w: Tensor,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> Layer:
        """See `merge_of`."""
        dtype = dtype or G.dtype
        G, H0, rows = (in_order_of(w, t) for t in (G, H0, w))
        options: dict[str, Any] = {"dtype": torch.float32, "device": w.device}
        scratch, neurons = (torch.empty(n, w.shape[0], **options) for n in (2, 3))
        update = H0 if overwrite and H0.dtype == dtype else empty_rows(w, dtype)
        layer = torch.empty(3, **options)
        return cls(G, H0, totals.contiguous(), rows, scratch, neurons, update, layer)

    def results(self, w: Tensor) -> Triple:
        return like_weight(self.update, w, self.update.dtype), self.neurons, self.layer


def merge_of(fill: Callable[[Layer, str, str, str], None]) -> Callable[..., Triple]:
    """The operator merge by a kernel that fills the results of one layer."""

    def merge(
        G: Tensor,
        H0: Tensor,
        totals: Tensor,
        w: Tensor,
        decay: str,
        gate: str,
        normalize: str,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> Triple:
        """See `composed.merge`; with `overwrite` it is the update that may take H0's memory."""
        dtypes = [t.dtype for t in (G, H0, totals, w)] + [dtype or G.dtype]
        if w.numel() == 0 or any(kind not in FLOATS for kind in dtypes):
            return composed.merge(G, H0, totals, w, decay, gate, normalize, dtype)
        layer = Layer.of(G, H0, totals, w, dtype, overwrite)
        fill(layer, decay, gate, normalize)
        return layer.results(w)

    return merge


def foreach_merge_of(
    fill: Callable[[Sequence[Layer], str, str, str], None],
) -> Callable[..., Triples]:
    """The operator foreach_merge by a kernel that fills the results of many layers at once."""

    def foreach_merge(
        G: Sequence[Tensor],
        H0: Sequence[Tensor],
        totals: Sequence[Tensor],
        w: Sequence[Tensor],
        decay: str,
        gate: str,
        normalize: str,
    ) -> Triples:
        tensors = (*G, *H0, *totals, *w)
        if any(t.dtype not in FLOATS for t in tensors) or any(t.numel() == 0 for t in w):
            return composed.foreach_merge(G, H0, totals, w, decay, gate, normalize)
        layers = [Layer.of(*one) for one in zip(G, H0, totals, w, strict=True)]
        fill(layers, decay, gate, normalize)
        results = [layer.results(weight) for layer, weight in zip(layers, w, strict=True)]
        update, neurons, statistics = ([result[i] for result in results] for i in range(3))
        return update, neurons, statistics

    return foreach_merge
