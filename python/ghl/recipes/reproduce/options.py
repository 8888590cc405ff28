"""The arguments of `ghl reproduce`, apart from what it runs: `ghl --help` imports no recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

EXPERIMENTS = {
    "sce": "1. classification: alignment against weight decay, four activations",
    "table": "2. the table of SRE: MLP",
    "length-sgd": "2. length of training: SGD",
    "length-dfa": "2. length of training: DFA",
    "transformer": "2. the table of SRE: transformer",
    "transformer-noise": "2. with less noise, under Adam",
    "phase": "3. noise against weight decay: the boundary and its exponent",
    "regression": "3. linear regression against its closed form",
    "generalisation": "4. generalisation against alignment",
    "early": "5. the first steps",
    "neurons": "6. neurons one by one",
    "batch": "7. batch size",
    "lr": "8. learning rate",
    "noise": "9. noise under Adam",
    "regularisers": "10. regularisers other than weight decay",
    "rules": "11. networks that learn by GHL and by Oja's rule",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ghl reproduce`."""
    listed = "; ".join(f"{name} ({text})" for name, text in EXPERIMENTS.items())
    add = parser.add_argument
    add(
        "experiments",
        nargs="*",
        metavar="EXPERIMENT",
        help=f"all by default, sce with --root alone: {listed}",
    )
    out = Path("runs/reproduce")
    add("--out", type=Path, default=out, metavar="DIR", help="of results, %(default)s")
    add(
        "--seeds",
        type=int,
        default=10,
        help="of every MLP, %(default)s (fewer where an experiment says so)",
    )
    add("--transformer-seeds", type=int, default=3, help="of every transformer, %(default)s")
    add(
        "--processes",
        type=int,
        default=2,
        help="cells computed at a time, with a thread each, %(default)s",
    )
    add("--root", help="directory of CIFAR-10 or Fashion-MNIST, for sce")
    add("--shorten", type=int, default=1, help="divide the length of every training, for a trial")
