"""Seconds from `import ghl_kernels` to the first finished update, in a fresh process.

`python -m bench.first_update --out FILE` measures it with an empty and with a warm Triton cache,
and as where there is no Triton, which is by the kernels compiled ahead of time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# A 3×3 layer of ResNet-50. Starting the GPU and making the tensors are a trainer's own cost.
SCRIPT = """
import sys, time
import torch
if sys.argv[3] == "without":
    sys.modules["triton"] = None
device, batch = sys.argv[1], int(sys.argv[2])
def tensor(*shape):
    t = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return t.contiguous(memory_format=torch.channels_last)
x, y, g, w = tensor(batch, 64, 56, 56), tensor(batch, 64, 56, 56), tensor(batch, 64, 56, 56), \
    tensor(64, 64, 3, 3)
wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
wait()
start = time.perf_counter()
import ghl_kernels
torch.ops.ghl_kernels.conv2d_update(
    x, y, g, w, [1, 1], [1, 1], [1, 1], 1, "softmax", 1.0, "oja", "sign", "absmax"
)
wait()
print(time.perf_counter() - start, ghl_kernels.last("conv2d_update").name)
"""


def once(device: str, batch: int, cache: str, triton: str = "with") -> tuple[float, str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, device, str(batch), triton]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    seconds, ran = done.stdout.split()[-2:]
    return float(seconds), ran


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        empty, ran = once(args.device, args.batch, cache)
        warm = min(once(args.device, args.batch, cache)[0] for _ in range(2))
        bare = [once(args.device, args.batch, cache, "without") for _ in range(2)]
    without, by = min(bare)
    result = {"empty_cache": empty, "warm_cache": warm, "ran": ran}
    result |= {"without_triton": without, "ran_without_triton": by}
    args.out.write_text(json.dumps(result))
    print(
        f"first update: {empty:.2f} s, with a warm cache {warm:.2f} s, by {ran}; "
        f"without Triton {without:.2f} s, by {by}"
    )


if __name__ == "__main__":
    main()
