"""compute-sanitizer's tools over `bench.sanitize`, and whether what they say is of kernels of ours.

`python -m bench.sanitizers DIRECTORY` runs all of them, and leaves their logs there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = "memcheck", "racecheck", "synccheck", "initcheck"
LINES_OF_A_LOG = 80  # that are worth keeping
ACCESS = re.compile(
    r"(Race reported between|and) (Write|Read) access at (.+?)(?: \[\d+ hazards\])?$"
)


def tool() -> str | None:
    """The program, which need not be on the PATH; None if it is not installed."""
    places = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    return shutil.which("compute-sanitizer", path=places)


def kernel_names() -> set[str]:
    sources = [
        *(ROOT / "ghl_kernels" / "triton").glob("*.py"),
        *(ROOT / "csrc" / "cuda").glob("*.h"),
    ]
    return {n for path in sources for n in re.findall(r"\b(\w+_kernel)\(", path.read_text())}


def main() -> int:
    """Run all of compute-sanitizer's tools side by side; 1 if one blames a kernel of ours."""
    work = Path(sys.argv[1])
    running = {name: watched(work, name) for name in SANITIZERS}
    blamed = 0
    for name, (process, log) in running.items():
        status = process.wait()
        text = log.read_text(errors="replace") if log.exists() else ""
        print("\n".join(list(dict.fromkeys(text.splitlines()))[:LINES_OF_A_LOG]))
        verdict, bad = judge(status, text)
        blamed += bad
        print(f"{name}: {verdict}", flush=True)
    return 1 if blamed else 0


def watched(work: Path, name: str) -> tuple[subprocess.Popen[bytes], Path]:
    """`bench.sanitize` under a tool, and where that writes what it sees.

    Each allocation is one of CUDA's, or a read beyond a tensor would hit its neighbour unseen.
    """
    sanitizer = tool()
    assert sanitizer, "the stage is skipped without it"
    log = work / f"{name}.log"
    command = [sanitizer, "--tool", name, "--error-exitcode", "9", "--log-file", str(log)]
    command += [sys.executable, "-m", "bench.sanitize"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    return process, log


def judge(status: int, log: str) -> tuple[str, bool]:
    """What a sanitizer's exit status and log mean, and whether kernels of ours are to blame."""
    ours = sorted(name for name in kernel_names() if name in log)
    if "Device not supported" in log:
        return "the tool does not support this machine", False
    if status == 0:
        return "no errors", False
    if status == 9 and explained(log):
        return "hazards that the tool sees where none is, no others", False
    if ours:
        return f"errors in {', '.join(ours)}", True
    if status == 9:
        return "errors, none in a kernel of ours", False
    return f"the program ended with {status}", True


def explained(log: str) -> bool:
    """Whether racecheck's hazards are all of the kind that it sees where none is: a store of a
    Triton kernel with itself. Where a tile has fewer numbers than a program has threads, several
    warps hold the same ones, and each stores them for a reduction.
    """
    first, found = ("", ""), []
    for line in log.splitlines():
        if access := ACCESS.search(line.strip()):
            begins, kind, place = access.groups()
            if begins != "and":
                first = kind, place
            else:
                found.append((*first, kind, place))
    return bool(found) and all(
        one == other == "Write" and at == also_at and ".py:" in at
        for one, at, other, also_at in found
    )


if __name__ == "__main__":
    sys.exit(main())
