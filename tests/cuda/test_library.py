"""The compiled libraries as users may get them: damaged, foreign, stale, for other GPUs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ghl import doctor
from ghl_kernels import library, ops
from ghl_kernels.cuda import kernels
from ghl_kernels.library import Library, runs_on
from ghl_kernels.tuning import tiles

ROOT = Path(__file__).parents[2]
NAME = "ghl_kernels_cuda"


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the CUDA library of a package that has nothing else."""
    monkeypatch.setattr(library, "DIRECTORY", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return tmp_path / f"lib{NAME}.so"


def compile_library(path: Path, code: str) -> None:
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=code, text=True, check=True)


def reason() -> str:
    found = library.load(NAME)
    assert not found.loaded and found.reason and "\n" not in found.reason
    return found.reason


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (12, 0), True),
        ("10.0+PTX", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        ("10.0+PTX", (10, 3), True),
    ],
)
def test_which_gpus_run_what_was_compiled(
    architecture: str, capability: tuple[int, int], runs: bool
) -> None:
    assert runs_on(architecture, capability) is runs


def test_no_library_is_no_error(beside: Path) -> None:
    assert reason().startswith("not built")


def test_a_torch_without_cuda(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside.write_bytes(b"not even looked at")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason() == f"not loaded: torch {torch.__version__} is built without CUDA"


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF\x01" + bytes(100)])
def test_what_is_no_library(beside: Path, content: bytes) -> None:
    beside.write_bytes(content)
    assert "does not load into torch" in reason() and "invalid ELF header" in reason()


def test_a_library_that_was_cut_off(beside: Path) -> None:
    """The loader would map it as its head says, and the process end with a bus error."""
    compile_library(beside, "char numbers[100000] = {1}; int ghl_kernels_abi(void) { return 2; }")
    whole = beside.read_bytes()
    beside.write_bytes(whole[: len(whole) // 2])
    assert f"it was cut off after {len(whole) // 2} bytes" in reason()


def test_a_library_that_needs_a_symbol_that_torch_has_not(beside: Path) -> None:
    compile_library(beside, "int gone_from_torch(void); int (*use)(void) = gone_from_torch;")
    assert "undefined symbol: gone_from_torch" in reason() and library.REBUILD in reason()


@pytest.mark.parametrize("abi", [None, library.ABI - 1, library.ABI + 1])
def test_a_library_of_another_version_registers_nothing(beside: Path, abi: int | None) -> None:
    """Not even its operators: PyTorch ends the process over one that this Python has not."""
    code = "#include <stdlib.h>\nvoid ghl_kernels_register(void) { abort(); }"
    if abi is not None:
        code += f"\nint ghl_kernels_abi(void) {{ return {abi}; }}"
    compile_library(beside, code)
    wanted = f"of another version (its seam is {abi or 1}, this package's is {library.ABI})"
    assert reason() == f"{wanted}: {library.REBUILD}"


def test_a_library_for_this_package_is_loaded_and_its_age_noticed(
    beside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = {"source_hash": "0123", "cuda_architectures": "8.0 9.0a"}
    code = f"int ghl_kernels_abi(void) {{ return {library.ABI}; }} int called;"
    code += "void ghl_kernels_register(void) { called = 1; }"
    for name, value in functions.items():
        code += f'const char* ghl_kernels_{name}(void) {{ return "{value}"; }}'
    compile_library(beside, code)
    found = library.load(NAME)
    assert found.loaded and library.stale(found)
    assert library.architectures(found) == ("8.0", "9.0a")
    assert "compiled for 8.0 9.0a, none of which" in (library.unfit(found, (10, 0)) or "")
    assert library.unfit(found, (8, 6)) is None
    monkeypatch.setitem(library._serving, "cuda", found)
    (line,) = (s for s in doctor.compiled() if s.startswith("cuda library"))
    assert "architectures 8.0 9.0a" in line and "from other sources than those beside it" in line


def test_an_introspection_module_of_another_python(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (beside.parent / "_introspection.cpython-399-x86_64-linux-gnu.so").write_bytes(b"foreign")
    assert library.introspection() is None
    assert library.kernel_resources() == ()
    first = next(doctor.compiled())
    assert first.startswith("_introspection.cpython-399") and library.REBUILD in first


def test_a_damaged_package_imports_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Both libraries and the module cut off: it learns by PyTorch's operators."""
    package = tmp_path / "ghl_kernels"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ghl_kernels", package, ignore=ignored)
    for path in package.glob("*.so"):
        path.write_bytes(path.read_bytes()[:20000])
    program = (
        "import torch, ghl_kernels\n"
        "ghl_kernels.ops.merge(*torch.ones(2, 3, 4), torch.ones(4), torch.ones(3, 4),"
        " 'oja', 'sign', 'absmax')\n"
        "print(ghl_kernels.last('merge'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "name='composed'" in done.stdout


def test_python_and_csrc_agree_on_their_version() -> None:
    header = (ROOT / "csrc" / "abi.h").read_text()
    assert re.findall(r"#define GHL_ABI (\d+)", header) == [str(library.ABI)]


def test_every_overload_that_a_library_implements_is_declared() -> None:
    declared = {schema.partition("(")[0] for schema in ops.SCHEMAS}
    for device in ("cpu", "cuda"):
        source = (ROOT / "csrc" / device / "library.cpp").read_text()
        implemented = re.findall(r'm\.impl\("([^"]+)"', source)
        assert implemented and set(implemented) <= declared


@pytest.fixture
def compiled() -> Library:
    found = library.serving("cuda")
    if found is None or not found.loaded:
        pytest.skip(f"no CUDA library: {found.reason if found else 'unknown'}")
    return found


def test_hoppers_own_kernels_have_the_registers_that_their_warps_exchange(
    compiled: Library,
) -> None:
    """The launcher refuses any other number: a warp would wait for registers that are not there."""
    if "9.0a" not in library.architectures(compiled):
        pytest.skip("the CUDA library is not built for 9.0a")
    threads = {
        (tile.block_c // tile.box, tile.cluster, tile.resident): 32 * tile.warps
        for strategy in tiles.BY_SM90
        for _, tile in kernels.compiled_tiles(strategy, torch.bfloat16, True, True, 227 * 1024)
    }
    found: dict[tuple[int, int, bool], set[int]] = {}
    for kernel in library.kernel_resources():
        shape = re.search(r"sm90::Shape<(\d), (\d), (true|false)>", kernel.kernel)
        if shape:
            key = int(shape[1]), int(shape[2]), shape[3] == "true"
            found.setdefault(key, set()).add(kernel.registers)
    assert found == {shape: {65536 // n // 8 * 8} for shape, n in threads.items()}


def test_no_kernel_spills(compiled: Library) -> None:
    """Every kernel, on every architecture, by the assembler's own report."""
    listed = library.kernel_resources()
    assert {k.architecture.rstrip("a") for k in listed} == {
        "sm_" + a.partition("+")[0].rstrip("a").replace(".", "")
        for a in library.architectures(compiled)
    }
    assert [k for k in listed if k.spilled_bytes] == []
    assert all(0 < k.registers <= 255 for k in listed)
    names = " ".join(k.kernel for k in listed)
    for name in ("statistics_kernel", "merge_kernel", "sum_splits_kernel", "dual_wgrad_kernel"):
        assert name in names


def test_the_doctor_tells_of_kernels_and_gpus(
    compiled: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = (s for s in doctor.compiled() if s.startswith("cuda library"))
    number = len({k.kernel for k in library.kernel_resources()})
    assert f"{number} kernels, at most " in line and "none spilled" in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(8, 6), (7, 0)][i])
    _, fits, old = doctor.devices()
    assert fits == "cuda:0: GPU 0, sm_86; the CUDA library fits"
    assert "none of which runs on a GPU of compute capability 7.0" in old


def test_the_tiles_of_the_library(compiled: Library) -> None:
    """Every kind of layer has one that runs where a block has 99 KB of shared memory, as on compute
    capability 8.6 and 8.9; what needs more is not offered there."""
    from ghl_kernels.cuda import kernels

    kernels.compiled_tiles.cache_clear()
    for dtype in kernels.DTYPES:
        for tf32 in (True, False):
            for pointwise in (True, False):
                known = kernels.compiled_tiles("cuda", dtype, tf32, pointwise, 99 * 1024)
                assert [number for number, _ in known][:1] == [0]
                assert all(t.packed and t.programs >= 1 and t.block_m % 8 == 0 for _, t in known)
    everywhere, on_most = (
        kernels.compiled_tiles("cuda", torch.bfloat16, True, True, kilobytes * 1024)
        for kilobytes in (99, 163)
    )
    assert set(everywhere) < set(on_most)


def test_nothing_of_the_compiled_implementations_needs_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import ghl_kernels.cuda.fused, ghl_kernels.cuda.sm90, ghl.bench.tuning\n"
        "print([name for name in sys.modules if name.startswith('ghl_kernels.triton')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
