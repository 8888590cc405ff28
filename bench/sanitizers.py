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
MOST_PLACES = 6  # that a verdict names
HAZARD = "Race reported between"
ACCESS = re.compile(rf"(?:{HAZARD}|and) (Write|Read) access at (.+?)(?: \[\d+ hazards\])?$")
PLACE = re.compile(r"\bat (.+?)\+0x[0-9a-f]+(?: in (\S+))?(?: \[\d+ hazards\])?$")


def tool() -> str | None:
    """The program, which need not be on the PATH; None if it is not installed."""
    places = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    return shutil.which("compute-sanitizer", path=places)


def sources() -> list[Path]:
    cuda, triton = ROOT / "csrc" / "cuda", ROOT / "ghl_kernels" / "triton"
    return [*triton.glob("*.py"), *cuda.glob("*.h"), *cuda.glob("*.cu")]


def kernel_names() -> set[str]:
    return {n for path in sources() for n in re.findall(r"\b(\w+_kernel)\(", path.read_text())}


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
    if "Device not supported" in log:
        return "the tool does not support this machine", False
    if status == 0:
        return "no errors", False
    lines = log.splitlines()
    left = unexplained(lines)
    ours, others = blamed(left)
    if ours:
        return f"errors in {', '.join(ours[:MOST_PLACES])}", True
    if status != 9:
        return f"the program ended with {status}", True
    if len(left) < len(lines) and not others:
        return "hazards that the tool sees where none is, no others", False
    return ", ".join(["errors, none in a kernel of ours", *others[:MOST_PLACES]]), False


def unexplained(lines: list[str]) -> list[str]:
    """A log without the accesses of hazards that are explained."""
    hazards: list[list[str]] = [[]]
    for line in lines:
        if HAZARD in line:
            hazards.append([])
        hazards[-1].append(line)
    return [
        line
        for hazard in hazards
        for line in hazard
        if not (ACCESS.search(line) and explained(hazard))
    ]


def explained(hazard: list[str]) -> bool:
    """Whether racecheck sees it where none is: a store of a Triton kernel with itself. Where a
    tile has fewer numbers than a program has threads, several warps hold the same ones, and each
    stores them for a reduction.
    """
    accesses = [found.groups() for line in hazard if (found := ACCESS.search(line))]
    place = accesses[0][1]
    return len(accesses) > 1 and {*accesses} == {("Write", place)} and ".py:" in place


def blamed(lines: list[str]) -> tuple[list[str], list[str]]:
    """Where the errors are, each place once: in kernels of ours, and elsewhere."""
    files, kernels = {path.name for path in sources()}, sorted(kernel_names())
    ours: dict[str, None] = {}
    others: dict[str, None] = {}
    for line in lines:
        named = [name for name in kernels if name in line]
        if found := PLACE.search(line):
            function, file = short(found[1]), found[2] or ""
            is_ours = named or file.split(":")[0] in files
            (ours if is_ours else others)[f"{function} in {file}" if file else function] = None
        else:
            ours.update(dict.fromkeys(named))
    return [*ours], [*others]


def short(function: str) -> str:
    """Without its type, our namespace, and arguments, its templates' as well."""
    while (bare := re.sub(r"<[^<>]*>", "", function)) != function:
        function = bare
    words = function.split("(")[0].split()
    return words[-1].removeprefix("ghl::cuda::") if words else function


if __name__ == "__main__":
    sys.exit(main())
