"""Peak transient memory of a call: what it needs above its inputs, its result included.

Read from the kernel's high-water mark of this process, so that it sees every allocator. Run as a
program it measures one case in a fresh process: `python -m bench.memory deephebb.conv3 ghl`.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_transient(call: Callable[[], object]) -> int:
    """Bytes by which the resident set rises above its present size during the call."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def in_fresh_process(case: str, implementation: str) -> int:
    """peak_transient of a case, unspoilt by what this process has freed and kept."""
    command = [sys.executable, "-m", "bench.memory", case, implementation]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    import dataclasses

    from bench.cases import CASES, tensors, update

    layer, name = CASES[sys.argv[1]], sys.argv[2]
    small = dataclasses.replace(layer, batch=1)
    update(small, name, tensors(small))()  # loads and compiles
    print(peak_transient(update(layer, name, tensors(layer))))


if __name__ == "__main__":
    main()
