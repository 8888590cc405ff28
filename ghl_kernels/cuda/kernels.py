"""Calls of the compiled kernels, and which of their tiles a layer takes.

Allocates what the kernels write, and hands it over; arguments are already checked.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ghl_kernels import layout
from ghl_kernels import library as libraries
from ghl_kernels.compiled import code, logsumexp_by
from ghl_kernels.fold import Fold
from ghl_kernels.merges import Layer, foreach_merge_of, merge_of
from ghl_kernels.pairs import Kernels, Task, as_it_lies
from ghl_kernels.problem import Problem, dot_precision
from ghl_kernels.splits import Partials, processors
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import BY_SM90, Entry, Tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of csrc/cuda/params.h
MOST_TILES = 16  # that are asked for; the numbers of tiles have no gaps
SHARED_BYTES, REGISTERS = 163 * 1024, 65536  # of a multiprocessor of compute capability 8.0
LARGEST_SHARED_BYTES = 227 * 1024  # of a block on compute capability 9.0 and 10.0
REGISTERS_BESIDE_SUMS = 72  # of a thread
BOX = 64  # kBox of csrc/cuda/sm90_layout.h
EXCHANGED = "cuda_sm90_exchanged"
MOST_EXCHANGED = 1024  # kMostExchanged of csrc/cuda/sm90_exchange.h, neurons


@functools.cache
def compiled_tiles(
    strategy: str, dtype: torch.dtype, tf32: bool, pointwise: bool, most_shared: int
) -> tuple[tuple[int, Tile], ...]:
    """The tiles that the library has and a GPU whose blocks have `most_shared` bytes of shared
    memory runs, with their numbers."""
    library = libraries.serving("cuda")
    if library is None or not library.loaded:
        return ()
    ask = ctypes.CDLL(str(library.path)).ghl_kernels_cuda_tile
    ask.argtypes = [ctypes.c_int, ctypes.c_int, *[ctypes.c_bool] * 3, ctypes.c_void_p]
    found = []
    for number in range(MOST_TILES):
        fields = (ctypes.c_int * 8)()
        ask(number, DTYPES.index(dtype), tf32, pointwise, strategy in BY_SM90, fields)
        rows, neurons, columns, threads, stages, shared_bytes, cluster, exchanges = fields
        if rows and shared_bytes <= most_shared and exchanges == (strategy == EXCHANGED):
            registers = 2 * neurons * columns + REGISTERS_BESIDE_SUMS * threads
            blocks = max(1, min(REGISTERS // registers, SHARED_BYTES // shared_bytes))
            tile = Tile(
                rows, neurons * cluster, columns, threads // 32, stages, blocks, packed=True,
                box=BOX if strategy in BY_SM90 else 0, cluster=cluster,
                resident=bool(exchanges),
            )  # fmt: skip
            found.append((number, tile))
    return tuple(found)


def most_shared_bytes() -> int:
    """Of one block, on the current device; without a GPU, of the largest there is."""
    if not torch.cuda.is_available():
        return LARGEST_SHARED_BYTES
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.shared_memory_per_block_optin


def most_programs() -> int:
    """Of Hopper's own kernels at once, on the current device; without a GPU, of an H200."""
    if not torch.cuda.is_available():
        return 132
    return processors(torch.device("cuda", torch.cuda.current_device()))


def tiles_for(strategy: str, problem: Problem) -> tuple[tuple[int, Tile], ...]:
    """The compiled tiles that a layer may take, with their numbers."""
    tf32 = dot_precision(problem) == "tf32"
    known = compiled_tiles(strategy, problem.dtype, tf32, problem.pointwise, most_shared_bytes())
    if strategy != EXCHANGED:
        return known
    # a layer too large to be folded is run as it is
    seen, most = {problem, as_run(problem)}, most_programs()
    return tuple(
        (n, tile) for n, tile in known if all(tiles.programs(p, tile) <= most for p in seen)
    )


@functools.lru_cache(maxsize=4096)
def exchange_bytes(neurons: int, splits: int, rows_per_split: int) -> int:
    """The memory that blocks of threads exchange u by."""
    library = libraries.serving("cuda")
    assert library is not None
    ask = ctypes.CDLL(str(library.path)).ghl_kernels_cuda_exchange_bytes
    ask.argtypes, ask.restype = [ctypes.c_int] * 3, ctypes.c_int64
    return int(ask(neurons, splits, rows_per_split))


def as_run(problem: Problem) -> Problem:
    """The layer that the kernels see: few channels are folded wherever they can be, because wide
    copies need it."""
    return Fold.of(problem).folded() if tiles.folds(problem) else problem


def sm90_unfit(strategy: str, problem: Problem) -> str | None:
    """Why Hopper's own kernels cannot run a layer by a strategy; None if they can."""
    if problem.dtype.itemsize != 2:
        return f"its products are of 16-bit numbers, not {problem.dtype}"
    if problem.groups > 1 and (problem.channels % 8 or problem.neurons % 8):
        sizes = f"{problem.channels} channels and {problem.neurons} neurons"
        return f"its copies take groups of multiples of 8, not of {sizes}"
    return not_exchanged(problem) if strategy == EXCHANGED else None


def not_exchanged(problem: Problem) -> str | None:
    """Why blocks of threads cannot exchange a layer's u; None if they can."""
    if problem.competition != "softmax":
        return f"u that is exchanged is a softmax, not {problem.competition}"
    if problem.sum_u:
        return "u that is exchanged has no sums, which are asked for"
    if problem.groups > 1 or problem.neurons % 8 or problem.neurons > MOST_EXCHANGED:
        fits = f"one group of a multiple of 8 neurons up to {MOST_EXCHANGED}"
        return f"u is exchanged of {fits}, not of {problem.groups} of {problem.neurons}"
    if not tiles_for(EXCHANGED, problem):
        return "its tiles are more than the GPU runs at once"
    return None


def suits(problem: Problem, tile: Tile) -> bool:
    """Whether a tile is not mostly empty."""
    neurons, columns = (tiles.least_block(n) for n in (problem.neurons, problem.columns))
    return tile.block_k <= neurons and tile.block_c <= columns


def by_rule(problem: Problem, known: Sequence[tuple[int, Tile]]) -> Tile:
    """The largest tile that is not mostly empty, of boxes one that is filled best; of equal ones
    one that holds whole rows of y."""

    def rank(tile: Tile) -> tuple[int, ...]:
        size = tile.block_k * tile.block_c
        inside = suits(problem, tile)
        filled = -tiles.programs(problem, tile) * size if tile.box else 0
        return (
            inside,
            filled,
            size if inside else -size,
            tile.holds_rows(problem.neurons, problem.groups),
            min(tile.block_k, tile.block_c),
        )

    return max((tile for _, tile in known), key=rank)


def candidates(strategy: str, problem: Problem) -> list[Tile]:
    """What a tuner tries for a layer: the tiles that suit it, and each with twice the splits."""
    known = [tile for _, tile in tiles_for(strategy, problem)]
    suitable = [tile for tile in known if suits(as_run(problem), tile)] or known
    return [
        dataclasses.replace(tile, programs=n * tile.programs)
        for tile in suitable
        for n in (1, 2)
        if n == 1 or not tile.resident
    ]


def choose(strategy: str, problem: Problem, device: torch.device) -> Entry:
    """The entry for a layer: in use, measured, or by a rule of thumb.

    Raises RuntimeError where nothing is compiled for such a layer.
    """
    entry = tiles.used()
    if entry and number_of(entry.tile, strategy, problem) is not None:
        return dataclasses.replace(entry, strategy=strategy)
    return remembered(strategy, problem, device, dot_precision(problem))


@functools.lru_cache(maxsize=4096)
def remembered(strategy: str, problem: Problem, device: torch.device, precision: str) -> Entry:
    """What is measured, if the library still has that tile, or by a rule of thumb."""
    known = tiles_for(strategy, problem)
    if not known:
        raise RuntimeError(f"the CUDA library has no tile of {strategy} for {problem.dtype}")
    entry = tiles.nearest(problem, device, strategy, (strategy,))
    if entry and number_of(entry.tile, strategy, problem) is not None:
        return entry
    return Entry.for_layer(problem, strategy, by_rule(as_run(problem), known))


def forget() -> None:
    """What was asked of the library and looked up: it or a table is another one now."""
    compiled_tiles.cache_clear()
    exchange_bytes.cache_clear()
    remembered.cache_clear()


def number_of(tile: Tile, strategy: str, problem: Problem) -> int | None:
    """The library's number of a tile, split however; None if it has none such for the layer."""
    for number, known in tiles_for(strategy, problem):
        if dataclasses.replace(tile, programs=known.programs) == known:
            return number
    return None


Statistics = tuple[Tensor | None, Tensor | None, Tensor | None]


def statistics(y: Tensor, competition: str, tau: float) -> Statistics:
    """The largest, the inverse and, where it is asked for, the winner of each row of y (M, K)."""
    largest, inverse = (
        torch.empty(y.shape[0], dtype=torch.float32, device=y.device) for _ in range(2)
    )
    winner = None if competition == "softmax" else torch.empty_like(largest, dtype=torch.int32)
    torch.ops.ghl_kernels.statistics.cuda(
        y[:, :, None, None], largest, inverse, winner, code("competition", competition), tau
    )
    return largest, inverse, winner


def wgrad(strategy: str, task: Task, partials: Partials) -> None:
    """Fill `partials` from images x (N, C·groups, H, W) and matrices y and g (M, K·groups)."""
    problem, tile, images, y, g, competition, tau, out_size = task
    whole_rows = tile.holds_rows(problem.neurons, problem.groups)
    if strategy in BY_SM90:
        y, g = layout.in_chunks(y), layout.in_chunks(g)
        images = layout.in_chunks(images.movedim(1, -1)).movedim(-1, 1)
        whole_rows = whole_rows and problem.neurons % 8 == 0
    of_rows: Statistics = None, None, None
    exchange = None
    if strategy == EXCHANGED:
        size = exchange_bytes(problem.neurons, partials.splits, partials.rows_per_split)
        exchange = torch.empty(size, dtype=torch.uint8, device=y.device)
    elif competition != "linear" and not whole_rows:
        of_rows = statistics(y, competition, tau)
    G, H0, u_sums = partials.sums
    torch.ops.ghl_kernels.pair.cuda(
        images, y, g, *of_rows, G, H0, u_sums if partials.sum_u else None,
        problem.kernel_size, problem.stride, problem.padding, problem.dilation, out_size,
        problem.groups, code("competition", competition), tau, partials.channels_last,
        dot_precision(problem) == "tf32", partials.splits, partials.rows_per_split,
        number_of(tile, strategy, problem), strategy in BY_SM90, exchange,
    )  # fmt: skip


def sum_splits(partials: Partials) -> None:
    """Fill the results with the parts, added in a fixed order."""
    (*parts, u_parts), (*results, u_sums) = partials.sums, partials.results
    torch.ops.ghl_kernels.sum_splits.cuda(
        *parts, u_parts if partials.sum_u else None,
        *results, u_sums if partials.sum_u else None, partials.splits,
    )  # fmt: skip


def kernels(
    strategy: str, signal: Callable[[Tensor, str, float], tuple[Tensor, str]] = as_it_lies
) -> Kernels:
    """The kernels of `cuda`, or of Hopper's own instructions; `signal`: of y, see Kernels."""

    def tile(problem: Problem, w: Tensor) -> Tile:
        return choose(strategy, problem, w.device).tile

    def of_rows(task: Task, partials: Partials) -> None:
        wgrad(strategy, task._replace(x=task.x[:, :, None, None]), partials)

    def of_images(task: Task, partials: Partials) -> None:
        # few channels are gathered number by number anyway
        few = task.problem.channels < tiles.FEW_CHANNELS
        wgrad(strategy, task if few else task._replace(x=layout.as_images(task.x)), partials)

    def folds(problem: Problem, tile: Tile) -> bool:
        return tiles.folds(problem)

    return Kernels(tile, signal, of_rows, of_images, sum_splits, folds)


def fill_layers(layers: Sequence[Layer], decay: str, gate: str, normalize: str) -> None:
    """Fill the results of layers of any of the dtypes, together."""
    G, H0, totals, w, scratch, neurons, update, layer = (list(t) for t in zip(*layers, strict=True))
    torch.ops.ghl_kernels.foreach_merge.cuda(
        G, H0, totals, w, update, neurons, layer, scratch,
        code("decay", decay), code("gate", gate), code("normalize", normalize),
    )  # fmt: skip


def fill_layer(layer: Layer, decay: str, gate: str, normalize: str) -> None:
    fill_layers([layer], decay, gate, normalize)


logsumexp = logsumexp_by("cuda")
merge, foreach_merge = merge_of(fill_layer), foreach_merge_of(fill_layers)
