"""The implementation `triton_stored`: u is written once, in the dtype of y, and read by tiles.

For layers with so many columns that u would be made again many times.
"""

from __future__ import annotations

from torch import Tensor

from ghl_kernels import layout
from ghl_kernels.composed import update_of
from ghl_kernels.pairs import pair_by
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.fused import kernels
from ghl_kernels.triton.logsumexp import logsumexp
from ghl_kernels.triton.merge import merge
from ghl_kernels.triton.store_u import store_u

__all__ = ["foreach_merge", "logsumexp", "merge", "pair", "update"]


def stored_u(y: Tensor, competition: str, tau: float, apart: int = 1) -> tuple[Tensor, str]:
    """u takes the place of y, under a competition that is linear; `apart`: see `store_u`."""
    return store_u(layout.as_matrix(y), competition, tau, apart), "linear"


pair = pair_by(kernels("triton_stored", stored_u))
update = update_of(pair, merge)
