"""What a Monitor costs: training steps with one, at every step and every 50, against none.

Run as `python -m bench.alignment_overhead [--device cuda] [--out FILE]`. One process, the runs
interleaved in blocks of steps, medians over blocks: a figure is a ratio within one run. On a CPU it
is CPU time of one thread, on a GPU wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghl.alignment import Monitor
from ghl.recipes import models

# steps of a block where every 50th is measured, and where every one is; blocks of each variant
BLOCK, BLOCK_OF_EVERY, REPEATS = 50, {"cpu": 50, "cuda": 10}, {"cpu": 5, "cuda": 3}
Run = Callable[[], None]
Case = Callable[[], tuple[nn.Module, Tensor]]


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(256, 784)


def transformer() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(32 * 64, 10)), torch.randn(32, 32, 64)


def resnet20() -> tuple[nn.Module, Tensor]:
    return models.build("resnet20", 3, 10, 32, 0.5), torch.randn(16, 3, 32, 32)


def full_size(name: str, batch: int) -> Case:
    def build() -> tuple[nn.Module, Tensor]:
        model = models.build(name, 3, 1000, 224, 1.0)
        if name == "vit_b_16":  # its head starts at zero, and would hide the layers below it
            nn.init.normal_(model.heads.head.weight, std=0.02)
        return model, torch.randn(batch, 3, 224, 224)

    return build


CASES: dict[str, dict[str, Case]] = {
    "cpu": {
        "MLP 784-512-512-10, batch 256": mlp,
        "transformer, 2 layers of 64, 32×32 tokens": transformer,
        "resnet20 of half width, batch 16": resnet20,
    },
    "cuda": {
        "ResNet-50, batch 64, bf16": full_size("resnet50", 64),  # bound by the host
        "ResNet-50, batch 256, bf16": full_size("resnet50", 256),
        "ViT-B/16, batch 64, bf16": full_size("vit_b_16", 64),
    },
}
VARIANTS: dict[str, tuple[int, str] | None] = {
    "without": None,
    "every step, batch": (1, "batch"),
    "every step, both": (1, "both"),
    "every 50 steps, both": (50, "both"),
}


def training_step(model: nn.Module, x: Tensor) -> Run:
    classes = torch.arange(len(x), device=x.device) % 10
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = F.cross_entropy(model(x), classes)
        loss.backward()
        optimizer.step()

    return step


def seconds(step: Run, steps: int, device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = clock()
    for _ in range(steps):
        step()
    wait()
    return (clock() - begin) / steps


def measure(build: Case, device: str) -> dict[str, float]:
    """Seconds per step without a Monitor, and with one by its `every` and statistic."""
    runs, monitors = {}, []
    for name, options in VARIANTS.items():
        torch.manual_seed(0)
        model, x = build()
        layout = {"memory_format": torch.channels_last} if device == "cuda" else {}
        model.to(device, **layout)
        if options:
            monitors.append(Monitor(model, every=options[0], statistic=options[1]))
        runs[name] = training_step(model, x.to(device, **layout))
        seconds(runs[name], 2, device)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS[device]):
        for name, step in runs.items():
            steps = BLOCK_OF_EVERY[device] if name.startswith("every step") else BLOCK
            found[name].append(seconds(step, steps, device))
    return {name: statistics.median(values) for name, values in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "one thread, CPU time"
    print(f"torch {torch.__version__}, {where}, medians of {REPEATS[args.device]} blocks")
    ratios = {}
    for name, build in CASES[args.device].items():
        found = measure(build, args.device)
        base = found.pop("without")
        print(f"{name}: {base * 1e3:.2f} ms a step without", flush=True)
        for variant, value in found.items():
            print(f"  {variant:<22} {value / base:.2f}×", flush=True)
        ratios[name] = {variant: value / base for variant, value in found.items()}
        if args.out:  # what there is, should the next be interrupted
            args.out.write_text(json.dumps(ratios, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
