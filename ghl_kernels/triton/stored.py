"""The implementation `triton_stored`: u is written once, in the dtype of y, and read by tiles.

For layers with so many columns that u would be made again many times.
"""

from __future__ import annotations

from ghl_kernels.composed import updates
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.fused import pairs
from ghl_kernels.triton.logsumexp import logsumexp
from ghl_kernels.triton.merge import merge

__all__ = ["conv2d_pair", "conv2d_update", "foreach_merge", "linear_pair", "linear_update"]
__all__ += ["logsumexp", "merge"]


linear_pair, conv2d_pair = pairs("triton_stored", stored=True)
linear_update, conv2d_update = updates(linear_pair, conv2d_pair, merge)
