"""The implementation `cuda_sm90`: as `fused.py`, by the instructions that only Hopper has."""

from __future__ import annotations

from ghl_kernels.composed import update_of
from ghl_kernels.cuda.kernels import foreach_merge, kernels, logsumexp, merge
from ghl_kernels.pairs import pair_by

__all__ = ["foreach_merge", "logsumexp", "merge", "pair", "update"]

pair = pair_by(kernels("cuda_sm90"))
update = update_of(pair, merge)
