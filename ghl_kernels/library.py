"""Finds and loads the compiled libraries beside this package, and says what became of each.

Importing ghl_kernels never fails for a library that is absent or does not load: the operators are
then composed of PyTorch's own, and `ghl doctor` prints the reason kept here.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.machinery
import importlib.util
import struct
from pathlib import Path
from types import ModuleType

import torch

from ghl_kernels.source_hash import source_hash

DIRECTORY = Path(__file__).parent
ABI = 4  # as in csrc/abi.h: what Python and a library have to agree on
REBUILD = "run `make install`, or install ghl-kernels again"
OTHERS = f"from other sources than those beside it: {REBUILD}"


@dataclasses.dataclass(frozen=True)
class Library:
    """A compiled library: its path, and why it is not loaded (None when it is)."""

    path: Path
    reason: str | None

    @property
    def loaded(self) -> bool:
        return self.reason is None


_serving: dict[str, Library] = {}  # by type of device


def serve(**by_device: Library) -> None:
    """Have libraries, loaded or not, serve types of devices."""
    _serving.update(by_device)


def serving(device_type: str) -> Library | None:
    """The library for a type of device, loaded or not; None where there is none."""
    return _serving.get(device_type)


def load(name: str) -> Library:
    """Load lib{name}.so from beside this package, for torch.ops, if it fits them both."""
    path = DIRECTORY / f"lib{name}.so"
    if not path.exists():
        return Library(path, "not built: no compiler, torch or nvcc was found when installing")
    if name.endswith("_cuda") and torch.version.cuda is None:
        return Library(path, f"not loaded: torch {torch.__version__} is built without CUDA")
    try:
        broken = damage(path)
        if broken is None:
            return Library(path, register(ctypes.CDLL(str(path))))
    except OSError as error:
        broken = (str(error).strip().splitlines() or ["for no reason that it tells"])[0]
    return Library(path, f"does not load into torch {torch.__version__}: {broken}; {REBUILD}")


def register(library: ctypes.CDLL) -> str | None:
    """Have a library implement operators, if it is for this package; else why it is not called."""
    abi = library.ghl_kernels_abi() if hasattr(library, "ghl_kernels_abi") else 1
    if abi != ABI:
        return f"of another version (its seam is {abi}, this package's is {ABI}): {REBUILD}"
    library.ghl_kernels_register()
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a library as a file; None if nothing is.

    The loader maps a file as its head says: it would crash on one that was cut off later.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return "it is no library of this machine (invalid ELF header)"
    (offset,), (size, number) = (
        struct.unpack_from("<Q", head, 40),
        struct.unpack_from("<2H", head, 58),
    )
    if path.stat().st_size < offset + size * number:
        return f"it was cut off after {path.stat().st_size} bytes"
    return None


def text(path: Path, function: str) -> str | None:
    """What a loaded library's function returns, a text; None if it has no such function."""
    library = ctypes.CDLL(str(path))
    if not hasattr(library, function):
        return None
    call = getattr(library, function)
    call.restype = ctypes.c_char_p
    return call().decode()


def stale(library: Library) -> bool:
    """Whether a library was compiled from other sources than those beside this package."""
    return is_of_others(text(library.path, "ghl_kernels_source_hash"))


def is_of_others(sources: str | None) -> bool:
    """Whether the sources of this hash are not those beside this package."""
    here = source_hash()
    return here is not None and here != sources


@functools.cache
def architectures_of(path: Path) -> tuple[str, ...]:
    return tuple((text(path, "ghl_kernels_cuda_architectures") or "").split())


def architectures(library: Library) -> tuple[str, ...]:
    """What the CUDA library was compiled for, in the words of TORCH_CUDA_ARCH_LIST."""
    return architectures_of(library.path)


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture, as 8.0, 9.0a or 10.0+PTX, runs on such a GPU.

    Machine code runs on the same major and any later minor number, that of 9.0a on 9.0 alone, and
    that of 10.0f on its family; PTX on every later GPU, unless it is of such an architecture.
    """
    version, _, ptx = architecture.partition("+")
    special = version[-1] if version[-1] in "af" else ""
    major, minor = (int(number) for number in version.rstrip("af").split("."))
    if special == "a":
        return capability == (major, minor)
    if capability[0] == major and capability[1] >= minor:
        return True
    return ptx == "PTX" and not special and capability >= (major, minor)


def unfit(library: Library, capability: tuple[int, int]) -> str | None:
    """Why no code of the CUDA library runs on a GPU of that capability; None if some does."""
    compiled = architectures(library)
    if any(runs_on(architecture, capability) for architecture in compiled):
        return None
    version = ".".join(map(str, capability))
    return (
        f"the CUDA library was compiled for {' '.join(compiled)}, none of which runs on a GPU of "
        f"compute capability {version}: build it with TORCH_CUDA_ARCH_LIST={version}"
    )


def extension(name: str) -> ModuleType | None:
    """A pybind11 module, if one for this Python lies beside this file and loads."""
    spec = importlib.machinery.PathFinder.find_spec(f"ghl_kernels.{name}", [str(DIRECTORY)])
    if spec is None or spec.loader is None or (spec.origin and damage(Path(spec.origin))):
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        return None
    return module


def introspection() -> ModuleType | None:
    """The module of build information."""
    return extension("_introspection")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the assembler says of a kernel on an architecture: registers a thread, bytes of shared
    memory known when compiling, bytes spilled to local memory."""

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    spilled_bytes: int


def kernel_resources() -> tuple[Resources, ...]:
    """Every CUDA kernel that was compiled; none without the introspection module or nvcc."""
    module = introspection()
    return tuple(Resources(*row) for row in getattr(module, "kernel_resources", ()))
