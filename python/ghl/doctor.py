"""`ghl doctor`: what is installed, compiled and found here, and what each kind of layer will take.

Reads only; a broken library is reported, never raised.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from typing import Any

import torch

import ghl_kernels
from ghl_kernels import library
from ghl_kernels.library import Library
from ghl_kernels.tapes import launches, player

PACKAGES = ("ghl-kernels", "torch", "torchvision", "triton", "numpy", "scikit-learn", "matplotlib")
FLOATS = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Layers of networks as they are trained, by which the dispatcher is asked.
LAYERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("linear 768 to 3072", "linear_pair", {"neurons": 3072, "channels": 768, "linear": True}),
    ("conv2d 64 to 64, 3x3", "conv2d_pair", {"neurons": 64, "channels": 64, "kernel_size": (3, 3)}),
    ("conv2d 256 to 64, 1x1", "conv2d_pair", {"neurons": 64, "channels": 256}),
    ("conv2d 32 groups of 8", "conv2d_pair", {"neurons": 8, "channels": 8, "groups": 32}),
    ("conv2d depthwise", "conv2d_pair", {"neurons": 1, "channels": 1, "groups": 96}),
)


def main() -> int:
    """Print the findings; returns the exit status, 0."""
    for title, lines in (
        ("installed", installed()),
        ("compiled", compiled()),
        ("devices", devices()),
        ("layers", layers()),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")
    return 0


def installed() -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.machine()}"
    for package in PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{package}: not installed"


def compiled() -> Iterator[str]:
    module = library.introspection()
    if module is None:
        others = sorted(path.name for path in library.DIRECTORY.glob("_introspection*.so"))
        yield (
            f"{', '.join(others)} is not of this Python, or damaged: {library.REBUILD}"
            if others
            else "nothing: no C++ compiler (or no cmake, ninja or torch) was found when "
            "installing; everything works in plain PyTorch, only slower"
        )
    else:
        yield f"by {module.compiler} against the headers of torch {module.torch_headers}"
        yield f"for every torch from {module.torch_target_version} on, by its stable ABI"
        yield f"flags {module.flags}"
    for device in ("cpu", "cuda"):
        yield f"{device} library: {library_line(device, module)}"
    yield f"calls like earlier ones on a GPU: by {player.by_whom()}"
    by = "csrc/launches" if launches.compiled() is not None else "Triton: not built, or damaged"
    yield f"launches of Triton's kernels again: by {by}"


def library_line(device: str, module: Any) -> str:
    found: Library | None = library.serving(device)
    if found is None or not found.loaded:
        return found.reason or "" if found else "none"
    details = [f"loaded from {found.path}"]
    if device == "cuda":
        details += [f"architectures {' '.join(library.architectures(found))}", *resources()]
    elif module is not None:
        details.append(f"{module.instruction_set(str(found.path))} kernels run here")
    if library.stale(found):
        details.append(library.OTHERS)
    return "; ".join(details)


def resources() -> Iterator[str]:
    """What the assembler said of the CUDA kernels, in a line."""
    kernels = library.kernel_resources()
    if kernels:
        names, spilled = {k.kernel for k in kernels}, sum(k.spilled_bytes for k in kernels)
        yield (
            f"{len(names)} kernels, at most {max(k.registers for k in kernels)} registers, "
            + (f"{spilled} bytes spilled" if spilled else "none spilled")
        )


def devices() -> Iterator[str]:
    yield f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        yield "cuda: no GPU found"
    found = library.serving("cuda")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        line = f"cuda:{index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}"
        if found and found.loaded:
            line += f"; {library.unfit(found, (major, minor)) or 'the CUDA library fits'}"
        yield line


def layers() -> Iterator[str]:
    width = max(len(name) for name, *_ in LAYERS)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        example = torch.empty(0, device=device, dtype=FLOATS[device])
        for name, operator, sizes in LAYERS:
            problem = ghl_kernels.Problem(rows=200704, dtype=FLOATS[device], **sizes)
            backend = ghl_kernels.backend(operator, example, problem)
            yield f"{device} {name:<{width}}  {backend.name:<9} {backend.reason}"
