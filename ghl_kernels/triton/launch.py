"""The one way to launch a kernel of Triton's, which a tape can write down."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

from ghl_kernels.recorder import recorder


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
        here.launched(compiled[(*grid, 1, 1)[:3]], arguments)
