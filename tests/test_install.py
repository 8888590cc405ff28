"""The package as users may get it: without a compiler, and with a library that does not load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import torch, ghl, ghl_kernels
from ghl.doctor import main
torch.manual_seed(0)
layer = ghl.Conv2d(3, 4, 3)
layer(torch.randn(2, 3, 8, 8)).square().sum().backward()
print("largest", layer.weight.grad.abs().max().item())
print("ran", ghl_kernels.last("conv2d_pair"))
main()
"""


def run_in(package: Path) -> str:
    """Train a layer and run the doctor with the package of that directory and nothing else."""
    environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{package / 'python'}"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, env=environment, cwd=package, check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The source distribution, unpacked: nothing in it is compiled."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--formats", "gztar", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    return Path(str(archive).removesuffix(".tar.gz"))


def test_the_source_distribution_has_all_that_is_compiled(sources: Path) -> None:
    def compiled(root: Path) -> set[Path]:
        found = {path.relative_to(root) for path in (root / "csrc").rglob("*") if path.is_file()}
        return found | {path.relative_to(root) for path in root.glob("CMakeLists.txt")}

    assert compiled(sources) == compiled(ROOT)
    assert not list(sources.rglob("*.so"))


def test_without_what_tells_how_to_compile(sources: Path) -> None:
    """As without a compiler."""
    (sources / "CMakeLists.txt").unlink()
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(sources / "built")]
    done = subprocess.run(command, cwd=sources, check=True, capture_output=True, text=True)
    assert "CMakeLists.txt not found" in done.stdout + done.stderr


def test_without_a_compiler(sources: Path) -> None:
    """Builds, with a warning that says what is missing; works; the doctor says so."""
    built = sources / "built"
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(built)]
    environment = {**os.environ, "CXX": "/nonexistent/c++"}
    done = subprocess.run(
        command, cwd=sources, env=environment, check=True, capture_output=True, text=True
    )
    assert "a C++ compiler not found" in done.stdout + done.stderr
    assert not list(built.rglob("*.so"))

    output = run_in(built)
    assert "largest 1.0" in output
    assert "ran Backend(name='composed', reason='not built" in output
    assert "nothing: no C++ compiler" in output


def test_with_a_library_that_does_not_load(sources: Path) -> None:
    """A damaged or foreign library is reported with its path's reason, and passed over."""
    (sources / "ghl_kernels" / "libghl_kernels_cpu.so").write_bytes(b"not a library")
    output = run_in(sources)
    assert "largest 1.0" in output
    assert "ran Backend(name='composed', reason='does not load into torch" in output


def test_setup_imports_no_torch() -> None:
    """The build must not pay for, or depend on, importing torch."""
    script = (
        "import runpy, setuptools, sys; setuptools.setup = lambda **k: None; "
        "runpy.run_path('setup.py'); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False"


def test_importing_ghl_does_not_import_the_compiler_or_sharded_tensors() -> None:
    """They would be most of the time from a program's start to its first update."""
    heavy = ("torch._dynamo", "torch.distributed.tensor", "triton")
    program = f"import sys, torch, ghl; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
