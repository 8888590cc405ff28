"""Global-guided Hebbian learning for any PyTorch model: layers, swap, optimizer groups.

Kernels and operators are `ghl_kernels`; recipes and the command line are loaded on demand.
"""

from ghl import alignment
from ghl.layers import Conv2d, Linear
from ghl.parameters import param_groups
from ghl.swap import Report, swap, unswap
from ghl_kernels import Rule

__all__ = ["Conv2d", "Linear", "Report", "Rule", "alignment", "param_groups", "swap", "unswap"]
