"""Compiles by inductor what `ghl bench layers` measures, several layers side by side.

`python -m bench.compile_ahead`: what it leaves are torch's own caches on disk, in which the
measurement then finds its kernels. It times nothing: other work may run beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

import torch

from ghl.bench.clock import MODES
from ghl.bench.implementations import call, names
from ghl.bench.layers import layers_of
from ghl.cli import WORKLOADS

COMPILED = "natural.compiled", "trick"  # of the second its epilogue, which trick.matmul has too


def compile_layer(workload: str, number: int, device: str) -> str | None:
    """Run what is compiled of a layer once; None, or why that failed."""
    layer = layers_of(workload)[number]
    where = torch.device(device)
    try:
        with torch.no_grad():
            tensors = layer.tensors(MODES["bfloat16"], where)
            for name in names(layer, "bfloat16", where):
                if name in COMPILED:
                    call(layer, name, tensors)()
    except RuntimeError as error:  # of memory, say: it will be compiled when it is measured
        return f"{workload} {layer.name}: {error}".splitlines()[0][:200]
    finally:
        if where.type == "cuda":
            torch.cuda.empty_cache()
    return None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="bench.compile_ahead")
    parser.add_argument("workloads", nargs="*", default=WORKLOADS, metavar="MODEL_bBATCH")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.part is None:
        # not by multiprocessing: torch's keys name a module that has `torch` in it, and would name
        # the __mp_main__ of such processes, which the measurement does not have
        command = [sys.executable, "-W", "ignore", "-m", "bench.compile_ahead", *args.workloads]
        command += ["--device", args.device, "--processes", str(args.processes), "--part"]
        parts = [subprocess.Popen([*command, str(part)]) for part in range(args.processes)]
        return max(part.wait() for part in parts)
    layers = [(w, n) for w in args.workloads for n in range(len(layers_of(w)))]
    mine = layers[args.part :: args.processes]
    failed = [reason for w, n in mine if (reason := compile_layer(w, n, args.device))]
    for reason in failed:
        print(reason)
    print(f"compiled {len(mine) - len(failed)} of {len(mine)} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
