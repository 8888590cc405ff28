"""Finds and loads the compiled libraries beside this package, and says what became of each.

Importing ghl_kernels never fails for a library that is absent or does not load: the operators are
then composed of PyTorch's own, and `ghl doctor` prints the reason kept here.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

DIRECTORY = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Library:
    """A compiled library: its path, and why it is not loaded (None when it is)."""

    path: Path
    reason: str | None

    @property
    def loaded(self) -> bool:
        return self.reason is None


def load(name: str) -> Library:
    """Load lib{name}.so from beside this package into torch.ops."""
    path = DIRECTORY / f"lib{name}.so"
    if not path.exists():
        return Library(path, "not built: no compiler, torch or nvcc was found when installing")
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0]
        return Library(path, f"does not load into torch {torch.__version__}: {first_line}")
    return Library(path, None)


def introspection() -> ModuleType | None:
    """The pybind11 module of build information, if one for this Python lies beside this file."""
    name = "ghl_kernels._introspection"
    spec = importlib.machinery.PathFinder.find_spec(name, [str(DIRECTORY)])
    if spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        return None
    return module
