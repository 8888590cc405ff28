"""The machine code of what is shipped for Hopper: does the compiler keep the promises of wgmma?"""

from __future__ import annotations

import importlib.util
import runpy
import shutil
from pathlib import Path

import pytest

from ghl_kernels import library

CHECK = Path(__file__).parents[1] / "csrc" / "check_sm90_sass.py"
KERNELS = 44  # two dtypes, five tiles, four competitions; and two tiles that exchange u


def cuobjdump() -> str | None:
    """CUDA's, or the one in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    ours = Path(str(spec.origin)).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return shutil.which("cuobjdump") or (str(ours) if ours and ours.exists() else None)


def test_every_product_of_wgmma_keeps_its_registers() -> None:
    compiled = library.serving("cuda")
    if compiled is None or not compiled.loaded:
        pytest.skip("the CUDA library is not built")
    if "9.0a" not in library.architectures(compiled):
        pytest.skip("the CUDA library is not built for 9.0a")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump not found")
    checks = runpy.run_path(str(CHECK))
    kernels = checks["kernels"](tool, str(compiled.path))
    assert len(kernels) == KERNELS
    for code in kernels.values():
        checks["check"](code)
