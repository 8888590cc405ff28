"""The implementation `cuda_sm90_exchanged`: as `sm90.py`, by blocks that make u together.

For layers of several tiles: each row of u is made once, and y read once; u passes through L2.
"""

from __future__ import annotations

from ghl_kernels.composed import update_of
from ghl_kernels.cuda.kernels import EXCHANGED, foreach_merge, kernels, logsumexp, merge
from ghl_kernels.pairs import pair_by

__all__ = ["foreach_merge", "logsumexp", "merge", "pair", "update"]

pair = pair_by(kernels(EXCHANGED))
update = update_of(pair, merge)
