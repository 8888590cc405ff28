"""The implementation `cuda_sm90_stored`: Triton writes u once, csrc/cuda's kernels for Hopper have
its products.

For layers with so many columns that `cuda_sm90` would make u again many times: it then does nothing
but multiply. u's rows are written at multiples of 16 bytes, as its copies want them.
"""

from __future__ import annotations

import functools

from ghl_kernels.composed import update_of
from ghl_kernels.cuda.kernels import foreach_merge, kernels, logsumexp, merge
from ghl_kernels.pairs import pair_by
from ghl_kernels.triton.stored import stored_u
from ghl_kernels.tuning.tiles import CHUNK

__all__ = ["foreach_merge", "logsumexp", "merge", "pair", "update"]

pair = pair_by(kernels("cuda_sm90_stored", functools.partial(stored_u, apart=CHUNK)))
update = update_of(pair, merge)
