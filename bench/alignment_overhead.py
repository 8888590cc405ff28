"""What a Monitor costs: training steps with one, at every step and every 50, against none.

Run as `python -m bench.alignment_overhead`. One process, the three runs interleaved in blocks of 50
steps, medians over blocks: a figure is a ratio within one run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghl.alignment import Monitor
from ghl.recipes import models

BLOCK, REPEATS = 50, 5
Run = Callable[[], None]


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(256, 784)


def transformer() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(32 * 64, 10)), torch.randn(32, 32, 64)


def resnet20() -> tuple[nn.Module, Tensor]:
    return models.build("resnet20", 3, 10, 32, 0.5), torch.randn(16, 3, 32, 32)


CASES = {
    "MLP 784-512-512-10, batch 256": mlp,
    "transformer, 2 layers of 64, 32×32 tokens": transformer,
    "resnet20 of half width, batch 16": resnet20,
}


def training_step(model: nn.Module, x: Tensor) -> Run:
    classes = torch.arange(len(x)) % 10
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), classes).backward()
        optimizer.step()

    return step


def seconds(step: Run, steps: int) -> float:
    begin = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - begin) / steps


def measure(build: Callable[[], tuple[nn.Module, Tensor]]) -> dict[str, float]:
    """CPU seconds per step without a Monitor, and with one by its `every` and statistic."""
    variants: dict[str, tuple[int, str] | None] = {
        "without": None,
        "every step, batch": (1, "batch"),
        "every step, both": (1, "both"),
        "every 50 steps, both": (50, "both"),
    }
    runs, monitors = {}, []
    for name, options in variants.items():
        torch.manual_seed(0)
        model, x = build()
        if options:
            monitors.append(Monitor(model, every=options[0], statistic=options[1]))
        runs[name] = training_step(model, x)
        seconds(runs[name], 2)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, step in runs.items():
            found[name].append(seconds(step, BLOCK))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> int:
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, one thread, CPU time, medians of {REPEATS} blocks of {BLOCK}"
    )
    for name, build in CASES.items():
        found = measure(build)
        base = found.pop("without")
        print(f"{name}: {base * 1e3:.2f} ms a step without")
        for variant, value in found.items():
            print(f"  {variant:<22} {value / base:.2f}×")
    return 0


if __name__ == "__main__":
    sys.exit(main())
