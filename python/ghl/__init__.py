"""Global-guided Hebbian learning for any PyTorch model: layers, swap, synchronize, groups.

Kernels and operators are `ghl_kernels`; recipes and the command line are loaded on demand.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from ghl.layers import Conv2d, Linear
from ghl.parameters import param_groups
from ghl.swap import Report, swap, unswap
from ghl_kernels import Rule

if TYPE_CHECKING:
    from ghl import alignment
    from ghl.deferred import synchronize

__all__ = [
    "Conv2d", "Linear", "Report", "Rule", "alignment", "param_groups", "swap", "synchronize",
    "unswap",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What takes long to import (sharded tensors: a second) or look up, when it is first used."""
    if name == "alignment":
        return importlib.import_module("ghl.alignment")
    if name == "__version__":
        return importlib.metadata.version("ghl-kernels")
    if name == "synchronize":
        return importlib.import_module("ghl.deferred").synchronize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
