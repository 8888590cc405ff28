"""The implementation `cuda_sm90`: as `fused.py`, by the instructions that only Hopper has."""

from __future__ import annotations

from ghl_kernels.composed import updates
from ghl_kernels.cuda.kernels import foreach_merge, kernels, logsumexp, merge
from ghl_kernels.pairs import pairs

__all__ = ["conv2d_pair", "conv2d_update", "foreach_merge", "linear_pair", "linear_update"]
__all__ += ["logsumexp", "merge"]

linear_pair, conv2d_pair = pairs(kernels("cuda_sm90"))
linear_update, conv2d_update = updates(linear_pair, conv2d_pair, merge)
