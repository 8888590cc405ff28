"""The implementation `library`: u is written once by Triton, both products are cuBLAS's or cuDNN's.

For layers where the library's weight gradient is the fastest, and float32 without TF32.
"""

from __future__ import annotations

from torch import Tensor

from ghl_kernels import layout
from ghl_kernels.composed import pair_of, products_of, update_of
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.logsumexp import logsumexp
from ghl_kernels.triton.merge import merge
from ghl_kernels.triton.store_u import store_u

__all__ = ["foreach_merge", "logsumexp", "merge", "pair", "update"]


def compete(y: Tensor, competition: str, tau: float) -> Tensor:
    """u like y, with the neurons side by side."""
    u = store_u(layout.as_matrix(y), competition, tau)
    return u.view_as(y.movedim(1, -1)).movedim(-1, 1)


products = products_of(compete)
pair, update = pair_of(products), update_of(products, merge)
