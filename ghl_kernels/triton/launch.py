"""The one way to launch a kernel of Triton's, which a tape can write down."""

from __future__ import annotations

import functools
from typing import Any

from ghl_kernels import tape


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options), `arguments` being all of the kernel's parameters.

    Launched again, a kernel that was compiled comes without Triton's look at every argument.
    """
    compiled = kernel[grid](*arguments, **options)
    recorder = tape.recorder()
    if recorder is None:
        return
    if compiled is None:  # the interpreter's
        recorder.launched(functools.partial(kernel[grid], **options), arguments, by_address=False)
    else:
        recorder.launched(compiled[(*grid, 1, 1)[:3]], arguments)
