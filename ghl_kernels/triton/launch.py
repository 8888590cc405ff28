"""The one way to launch a kernel of Triton's, which a tape can write down."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs

from ghl_kernels.tapes.launches import ADDRESS, Kernel, Kind, TensorMap
from ghl_kernels.tapes.recorder import recorder

CODES = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip
THREADS_OF_WARP = 32


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options), `arguments` being all of the kernel's parameters.

    Launched again, a kernel that was compiled comes without Triton's look at every argument.
    """
    here = recorder()
    if here is None:
        kernel[grid](*arguments, **options)
        return
    with _disable_current_modes():  # what the interpreter does to tensors is no step
        compiled = kernel[grid](*arguments, **options)
    if compiled is None:  # the interpreter's
        here.launched(functools.partial(kernel[grid], **options), arguments, by_address=False)
    else:
        x, y, z = (*grid, 1, 1)[:3]
        rounded = any(getattr(value, "round_f32_to_tf32", False) for value in arguments)
        again = None if rounded else kernel_of(compiled, (x, y, z))
        here.launched(compiled[x, y, z], arguments, kernel=again)


def kernel_of(compiled: Any, grid: tuple[int, int, int]) -> Kernel | None:
    """What launches of a compiled kernel are made of; None where Triton has to make them, or is of
    a version that tells something else."""
    try:
        about = compiled.metadata
        more = about.launch_cooperative_grid, about.launch_pdl, about.global_scratch_size
        more += about.profile_scratch_size, getattr(about, "instrumentation_mode", "")
        kinds = kinds_of(compiled)
    except (AttributeError, ImportError, KeyError):
        return None
    if any(more) or about.num_ctas != 1 or kinds is None:
        return None
    threads = THREADS_OF_WARP * about.num_warps
    return Kernel(compiled.function, grid, threads, about.shared, kinds, compiled, is_told)


def kinds_of(compiled: Any) -> tuple[Kind, ...] | None:
    """Of a kernel's parameters in their order."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    described = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    kinds: list[Kind] = []
    for name in compiled.src.signature.values():
        if name == "constexpr":
            kinds.append(None)
        elif name.startswith("*"):
            kinds.append(ADDRESS)
        elif name.startswith("tensordesc"):
            how = next(described, None)
            if how is None or how["fp4_padded"] or how.get("is_im2col", False):
                return None
            data_type = TMA_DTYPE_DEVICE_TO_HOST[how["elem_type"]]
            box = tuple(how["block_size"])
            kinds.append(TensorMap(data_type, how["elem_size"], how["swizzle"], box))
        else:
            kinds.append(CODES[name])
    return tuple(kinds)


def is_told() -> bool:
    """Whether a profiler, say, hears of launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)
