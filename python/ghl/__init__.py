"""Global-guided Hebbian learning for any PyTorch model: layers, swap, synchronize, groups.

Kernels and operators are `ghl_kernels`; recipes and the command line are loaded on demand.
"""

from typing import TYPE_CHECKING, Any

from ghl.layers import Conv2d, Linear
from ghl.parameters import param_groups
from ghl.swap import Report, swap, unswap
from ghl_kernels import Rule

if TYPE_CHECKING:
    from ghl.deferred import synchronize

__all__ = ["Conv2d", "Linear", "Report", "Rule", "param_groups", "swap", "synchronize", "unswap"]


def __getattr__(name: str) -> Any:
    """`synchronize`, when it is first used: sharded tensors take a second to import."""
    if name != "synchronize":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ghl.deferred import synchronize

    return synchronize
