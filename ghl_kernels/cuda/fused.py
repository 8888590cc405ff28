"""The implementation `cuda`: u lives only in registers, whatever the layer, by mma.sync."""

from __future__ import annotations

from ghl_kernels.composed import update_of
from ghl_kernels.cuda.kernels import foreach_merge, kernels, logsumexp, merge
from ghl_kernels.pairs import pair_by

__all__ = ["foreach_merge", "logsumexp", "merge", "pair", "update"]

pair = pair_by(kernels("cuda"))
update = update_of(pair, merge)
