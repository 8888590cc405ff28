"""Runs every kernel for a GPU on small layers and compares with PyTorch's operators.

What compute-sanitizer watches: `compute-sanitizer --tool memcheck python -m bench.sanitize`. Few
rows and odd sizes, so that every kernel has a last tile that is not full.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import ghl_kernels
from ghl.bench.check import Expected, wrong_sums
from ghl.bench.clock import precision
from ghl.bench.layers import Layer
from ghl_kernels import Problem, composed, dispatch, splits
from ghl_kernels.cuda import kernels
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import Entry, Tile

LAYERS = (
    Layer("linear, whole rows", 1000, 72, 40, linear=True),
    Layer("linear, statistics", 700, 136, 520, linear=True),
    Layer("pointwise", 3, 64, 64, (17, 19)),
    Layer("3x3, three taps", 3, 64, 64, (13, 11), (3, 3), padding=(1, 1)),
    Layer("3x3, stride and dilation", 2, 40, 136, (15, 14), (3, 3), (2, 2), (2, 2), (2, 2)),
    Layer("1x1, stride 2", 3, 64, 80, (15, 13), stride=(2, 2)),
    Layer("packed", 2, 3, 72, (21, 18), (7, 7), (2, 2), (3, 3)),
    Layer("groups", 2, 64, 64, (9, 11), (3, 3), padding=(1, 1), groups=2),
    Layer("depthwise", 2, 48, 48, (12, 10), (3, 3), padding=(1, 1), groups=48),
)
ON_A_CPU = (  # the interpreter takes seconds for a thousand rows
    Layer("linear", 24, 20, 18, linear=True),
    Layer("3x3", 1, 16, 16, (5, 4), (3, 3), padding=(1, 1)),
)


class Few(NamedTuple):
    """A layer on a GPU of few multiprocessors, where blocks of threads come to more rows.

    patched: of `splits`. reached: whether they do, by the parts, the rows of one, and all rows.
    """

    layer: Layer
    patched: dict[str, Any]
    totals: str
    reached: Callable[[int, int, int], bool]


STRUNG = Few(
    Layer("3x3, tiles strung together", 16, 16, 128, (16, 16), (3, 3), padding=(1, 1)),
    {"processors": lambda device: 7, "FEWEST_BLOCKS": 1, "STRINGING": 0.0},
    "sums",
    lambda parts, rows, all_rows: parts > -(-all_rows // rows),
)
RING = Few(  # of six chunks of 256 rows
    Layer("linear, a ring gone round", 2300, 72, 136, linear=True),
    {"processors": lambda device: 3},
    "rows",
    lambda parts, rows, all_rows: rows > 6 * 256,
)
OTHER_COMPETITIONS = "hard", "softhebb", "linear"
MODES = {"cuda": "bfloat16", "cpu": "float32"}  # the interpreter's bfloat16 product is wrong


def truth(layer: Layer, tensors: tuple[Tensor, ...], competition: str) -> Expected:
    """G and H0 of a layer by PyTorch's operators in float32."""
    x, y, g, w = (t.float() for t in tensors)
    with precision("float32"):
        problem = layer.problem(x, y, g, w, competition)
        G, H0, _ = composed.pair(problem, x, y, g, w, layer.tau)
    return Expected(G, H0, update=G)


def operator_of(layer: Layer) -> tuple[str, tuple[object, ...]]:
    if layer.linear:
        return "linear_pair", ()
    pairs = (list(p) for p in (layer.stride, layer.padding, layer.dilation))
    return "conv2d_pair", (*pairs, layer.groups)


def tile_for(kind: str, device: torch.device) -> AbstractContextManager[None]:
    """The GPU's own table; a CPU, whose interpreter takes any tile, has none."""
    if device.type == "cuda":
        return nullcontext()
    tile = Tile(16, 16, 16, 4, 2, programs=8, packed=kind == "packed")
    if kind == "depthwise":
        tile = Tile(8, 16, 4, 4, 2, programs=8)
    return tiles.use(Entry(kind, 32, 1, 1, 1, "triton", tile))


def pairs(
    device: torch.device, mode: str, names: tuple[str, ...]
) -> Iterator[tuple[str, str | None]]:
    """What was run, and what is wrong with it, of the kernels that sum over a batch.

    Tensors are made and compared on the CPU: a sanitizer takes minutes for the kernels of others.
    """
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    layers = LAYERS if device.type == "cuda" else ON_A_CPU
    for layer in layers:
        tensors = layer.tensors(dtype, torch.device("cpu"))
        kind = tiles.kind(layer.problem(*tensors))
        operator, geometry = operator_of(layer)
        for competition in ("softmax", *(OTHER_COMPETITIONS if layer is layers[0] else ())):
            if competition != "softmax":  # of equal neurons a GPU's argmax may take any
                x, y, g, w = tensors
                tensors = x, torch.rand(y.shape).argsort(1).to(dtype) / 4, g, w
            expected = truth(layer, tensors, competition)
            there = tuple(t.to(device) for t in tensors)
            for name in names:
                problem = layer.problem(*there, competition)
                if dispatch.unavailable(name, there[0], problem):
                    continue  # groups that Hopper's kernels have no copies for
                totals = "rows" if name == kernels.EXCHANGED else "sums"
                with ghl_kernels.force(name), precision("tf32"), tile_for(kind, device):
                    G, H0, _ = getattr(torch.ops.ghl_kernels, operator)(
                        *there, *geometry, competition, layer.tau, totals
                    )
                wrong = wrong_sums(G.cpu(), H0.cpu(), expected, mode)
                yield f"{layer.name}, {competition}, {name}", wrong


def on_few(device: torch.device, mode: str, name: str) -> tuple[str, str | None]:
    """The same of the widest tile of Hopper's kernels on a part of a GPU."""
    few = RING if name == kernels.EXCHANGED else STRUNG
    layer = few.layer
    tensors = layer.tensors(torch.bfloat16, torch.device("cpu"))
    there = tuple(t.to(device) for t in tensors)
    problem, (operator, geometry) = layer.problem(*there), operator_of(layer)
    tile = max((tile for _, tile in kernels.tiles_for(name, problem)), key=lambda t: t.block_c)
    with (
        mock.patch.multiple(splits, **few.patched),
        tiles.use(Entry.for_layer(problem, name, tile)),
        ghl_kernels.force(name),
    ):
        parts, rows = splits.split_rows(problem, tile, device)
        pair = getattr(torch.ops.ghl_kernels, operator)
        G, H0, _ = pair(*there, *geometry, "softmax", layer.tau, few.totals)
    wrong = wrong_sums(G.cpu(), H0.cpu(), truth(layer, tensors, "softmax"), mode)
    if not few.reached(parts, rows, problem.rows):
        wrong = f"only {parts} parts of {rows} rows"
    return f"{layer.name}, softmax, {name}", wrong


def merges(device: torch.device, name: str) -> Iterator[tuple[str, str | None]]:
    """The same of an implementation's merge, foreach_merge and logsumexp."""
    torch.manual_seed(0)
    layers = []
    for neurons, columns in ((40, 72), (3, 2500), (130, 9)):
        G, H0, w = torch.randn(3, neurons, columns)
        layers.append((G, H0, torch.rand(neurons + 1) + 1, w))
    there = [tuple(t.to(device) for t in layer) for layer in layers]
    lists = [list(one) for one in zip(*there, strict=True)]
    for choices in (("oja", "sign", "absmax"), ("instar", "hebb", "mean")):
        exact = [composed.merge(*layer, *choices)[0] for layer in layers]
        with ghl_kernels.force(name):
            single = [torch.ops.ghl_kernels.merge(*layer, *choices)[0] for layer in there]
            together = torch.ops.ghl_kernels.foreach_merge(*lists, *choices)[0]
        for operator, found in (("merge", single), ("foreach_merge", together)):
            far = max(
                (a.cpu() - b).abs().amax().item() / b.abs().amax().item()
                for a, b in zip(found, exact, strict=True)
            )
            yield f"{operator}, {choices}, {name}", None if far < 1e-4 else f"off by {far:.1e}"
    y = torch.randn(5, 5000)
    with ghl_kernels.force(name):
        lse = torch.ops.ghl_kernels.logsumexp(y.to(device), 0.5, 1).cpu()
    far = (lse - composed.logsumexp(y, 0.5, 1)).abs().amax().item()
    yield f"logsumexp, {name}", None if far < 1e-4 else f"off by {far:.1e}"


def patches(device: torch.device) -> Iterator[tuple[str, str | None]]:
    """x laid along the rows, beside what F.unfold makes of it."""
    from ghl_kernels.triton.patches import empty_patches, lay_patches

    x = torch.randn(2, 35, 9, 8)
    options: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    problem = Problem(2 * 5 * 8, 4, 35, x.dtype, (3, 3), **options)
    wanted = F.unfold(x, (3, 3), **options).movedim(1, 0).flatten(1)
    for first, rows in ((0, 80), (37, 43)):
        room = empty_patches(rows, problem, x.to(device)).fill_(float("nan"))
        lay_patches(room, x.to(device), first, rows, problem, (5, 8), channels_last=False)
        same = torch.equal(room[:, :rows].cpu(), wanted[:, first : first + rows])
        yield f"patches of {rows} rows", None if same else "other patches"


def results(device: torch.device, names: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    yield from pairs(device, MODES[device.type], names)
    boxes = [name for name in names if name in tiles.BY_SM90]
    yield from (on_few(device, MODES[device.type], name) for name in boxes)
    if "triton" in names:
        yield from patches(device)
    for name in names:
        if name in ("triton", "cuda"):  # the others' are one of these
            yield from merges(device, name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=MODES)
    args = parser.parse_args()
    device = torch.device(args.device)
    some = torch.empty(0, dtype=torch.bfloat16, device=device)
    ours = [name for name in tiles.STRATEGIES if name not in tiles.BY_OTHERS]
    missing = {name: dispatch.unavailable(name, some, None) for name in ours}
    checked, bad = 0, 0
    for name, reason in missing.items():
        if reason:
            print(f"{name} is left out: {reason}")
    with torch.no_grad():
        for what, wrong in results(device, tuple(n for n in missing if not missing[n])):
            checked += 1
            if wrong:
                bad += 1
                print(f"{what}: {wrong}")
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{checked} results checked, {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
