"""Which strategy and which tile a layer takes on a GPU: looked up, never tuned, in a run.

A table is a JSON file of entries, each a layer's sizes and what was best for them; a layer takes
the entry nearest in the logarithms of its sizes among those of its kind. Tables: what
`ghl bench tune` wrote on this machine, else the one shipped for the GPU or its architecture: that
of compute capability 9.0 was measured on an H200, the others are computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ghl_kernels.problem import Problem
from ghl_kernels.tapes import player

SHIPPED = Path(__file__).parent / "tables"
BY_TRITON = ("triton", "triton_stored", "library")
BY_PATCHES = ("library_patches",)
BY_OTHERS = ("library", *BY_PATCHES)  # whose products, and so whose tiles, are not ours
BY_SM90 = ("cuda_sm90", "cuda_sm90_stored", "cuda_sm90_exchanged")
BY_CUDA = ("cuda", *BY_SM90)
STRATEGIES = (*BY_TRITON, *BY_PATCHES, *BY_CUDA)
UNPROVEN = ("cuda_sm90_exchanged",)  # as it is now never run on a GPU: tried where it is named
SMALLEST_BLOCK = 64  # that any layer may take, however small
FEW_CHANNELS = 16  # fewer do not fill a tile of one tap
ALIGNED = 16  # a multiple of it is what Triton compiles wide loads for
FEWEST_FOR_PATCHES = 256  # neurons that pay for patches written once and read twice, if unmeasured
CHUNK = 8  # 16-bit numbers that compiled kernels and tensor descriptors copy at once

_used = threading.local()


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program's share and how it runs.

    block_m rows a step, block_k neurons, block_c inputs (of one tap unless `packed`, as those of
    compiled kernels always are; a layer of few channels is folded by Triton for a tile that is not,
    by compiled kernels wherever it can be); `taps` of a kernel's row at once; `descriptors`: by the
    tensor memory accelerator where the layout allows; `box`: if not 0, the inputs come in boxes of
    one tap and up to so many; `cluster`: so many blocks of threads are one program, and have equal
    parts of its neurons; `resident`: all programs must be on the GPU at once; `programs`: how many
    blocks per multiprocessor to split the rows for.
    """

    block_m: int
    block_k: int
    block_c: int
    warps: int
    stages: int
    programs: int = 1
    taps: int = 1
    packed: bool = False
    descriptors: bool = False
    box: int = 0
    cluster: int = 1
    resident: bool = False

    def holds_rows(self, neurons: int, groups: int) -> bool:
        """Whether a block of threads has whole rows of y, and so needs no statistics of them."""
        return groups == 1 and neurons <= self.block_k and self.cluster == 1


# what a program of cuBLAS's is taken to have, for the rows to be split
OF_PATCHES = Tile(block_m=32, block_k=128, block_c=256, warps=8, stages=1, packed=True)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A layer's sizes and the choice for it. bits: of an activation. columns: of its weight.
    measured: on the table's GPU; else on another, or computed."""

    kind: str
    bits: int
    rows: int
    neurons: int
    columns: int
    strategy: str
    tile: Tile
    measured: bool = dataclasses.field(default=True, compare=False)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Entry:
        return cls(**{**fields, "tile": Tile(**fields["tile"])})

    @classmethod
    def for_layer(cls, problem: Problem, strategy: str, tile: Tile) -> Entry:
        """The choice of a strategy and a tile for a layer's sizes."""
        sizes = problem.rows, problem.neurons, problem.columns
        return cls(kind(problem), 8 * problem.dtype.itemsize, *sizes, strategy, tile)

    def distance(self, problem: Problem) -> float:
        pairs = (
            (self.rows, problem.rows),
            (self.neurons, problem.neurons),
            (self.columns, problem.columns),
        )
        return sum(abs(math.log2(a / max(b, 1))) for a, b in pairs)


@dataclasses.dataclass(frozen=True)
class Table:
    """name: the file's; measured: the GPU and versions it was tuned on, None if computed only.
    merges: the implementation whose merge of many layers was the fastest, None if not measured."""

    name: str
    measured: dict[str, str] | None
    entries: tuple[Entry, ...]
    merges: str | None = None

    @classmethod
    def read(cls, path: Path) -> Table:
        """ValueError naming the file if it is not a table of this version."""
        try:
            content = json.loads(path.read_text())
            measured = content["measured"]
            origin = {"measured": measured is not None and bool(measured["gpu"])}
            entries = tuple(Entry.of(origin | entry) for entry in content["entries"])
            return cls(path.stem, measured, entries, content.get("merges"))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a table of tiles of this version: {error}") from error

    def completed(self, other: Table) -> Table:
        """With the other's entries of the kinds and bits that this one lacks."""
        present = {(entry.kind, entry.bits) for entry in self.entries}
        more = (e for e in other.entries_on(self.gpu) if (e.kind, e.bits) not in present)
        return dataclasses.replace(self, entries=(*self.entries, *more))

    @property
    def gpu(self) -> str | None:
        return None if self.measured is None else self.measured["gpu"]

    def entries_on(self, gpu: str | None) -> tuple[Entry, ...]:
        """The entries as those of a table of this GPU: not measured on it if it is another."""
        if self.gpu == gpu:
            return self.entries
        return tuple(dataclasses.replace(entry, measured=False) for entry in self.entries)


def kind(problem: Problem) -> str:
    """The form of kernel that a layer needs; only entries of its kind are compared with it."""
    if problem.depthwise:
        return "depthwise"
    if problem.pointwise:
        return "pointwise"
    return "packed" if problem.channels < FEW_CHANNELS else "conv"


def folds(problem: Problem) -> bool:
    """Whether a layer may take the form of many channels (fold.py)."""
    return kind(problem) == "packed" and problem.foldable


def least_block(numbers: int) -> int:
    """The smallest power of two, from SMALLEST_BLOCK on, that holds them."""
    return max(SMALLEST_BLOCK, 1 << (numbers - 1).bit_length())


def column_tiles(problem: Problem, tile: Tile) -> int:
    """Programs that share the columns of a weight."""
    if tile.box:
        boxes = problem.columns // problem.channels * -(-problem.channels // tile.box)
        return -(-boxes // (tile.block_c // tile.box))
    across = problem.columns if tile.packed or problem.depthwise else problem.channels
    blocks = -(-across // tile.block_c)
    return blocks * (problem.columns // across // tile.taps)


def programs(problem: Problem, tile: Tile) -> int:
    """Programs that a split of the rows has."""
    if problem.depthwise and not tile.packed:
        return -(-problem.all_neurons // tile.block_k) * column_tiles(problem, tile)
    return problem.groups * -(-problem.neurons // tile.block_k) * column_tiles(problem, tile)


def user_tables() -> Path:
    """Where `ghl bench tune` keeps what it measured here."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ghl_kernels" / "tables"


def gpu_name(device: torch.device) -> str:
    """The GPU's name as a file is called: nvidia-h200."""
    name = torch.cuda.get_device_name(device).lower()
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def architecture(capability: tuple[int, int]) -> str:
    """The architecture whose table serves a GPU of this capability."""
    return {9: "sm90", 10: "sm100"}.get(capability[0], "sm80")


@functools.cache
def table(device: torch.device) -> Table:
    """The GPU's own table, with its architecture's entries for what it has none; else those."""
    shipped = Table.read(SHIPPED / f"{architecture(torch.cuda.get_device_capability(device))}.json")
    name = gpu_name(device)
    for path in (user_tables() / f"{name}.json", SHIPPED / f"{name}.json"):
        if path.exists():
            try:
                return Table.read(path).completed(shipped)
            except ValueError as error:
                warnings.warn(f"ghl_kernels does not use this table: {error}", stacklevel=2)
    return shipped


def forget() -> None:
    """What was read and looked up: a table is another one now."""
    table.cache_clear()
    nearest.cache_clear()


@contextlib.contextmanager
def use(entry: Entry) -> Iterator[None]:
    """Make every layer that this thread looks up inside take one entry: to try it or time it."""
    _used.entry, before = entry, getattr(_used, "entry", None)
    try:
        with player.paused():
            yield
    finally:
        _used.entry = before


def used() -> Entry | None:
    """What this thread is inside `use` of."""
    return getattr(_used, "entry", None)


def choose(problem: Problem, device: torch.device, strategy: str | None = None) -> Entry:
    """The nearest entry of Triton's strategies, of one if it has any, with a tile that fits."""
    entry = find(problem, device, strategy)
    if entry is None:
        name, bits = table(device).name, 8 * problem.dtype.itemsize
        raise ValueError(f"table {name} has no {bits}-bit entry of {kind(problem)}")
    return entry


def find(
    problem: Problem,
    device: torch.device,
    strategy: str | None = None,
    among: tuple[str, ...] = BY_TRITON,
) -> Entry | None:
    """The nearest entry among these strategies, of one if it has any; None if there is none."""
    entry = used()
    return fitting(entry, problem) if entry else nearest(problem, device, strategy, among)


@functools.lru_cache(maxsize=4096)
def nearest(
    problem: Problem, device: torch.device, strategy: str | None, among: tuple[str, ...]
) -> Entry | None:
    like = kind(problem), 8 * problem.dtype.itemsize
    entries = table(device).entries
    alike = [e for e in entries if (e.kind, e.bits) == like and e.strategy in among]
    if problem.neurons < FEWEST_FOR_PATCHES:
        alike = [e for e in alike if e.strategy not in BY_PATCHES or e.distance(problem) == 0]
    if like[0] == "packed" and not problem.foldable:
        alike = [e for e in alike if e.tile.packed] or alike
    if not alike:
        return None
    wanted = [e for e in alike if strategy in (None, e.strategy)] or alike
    entry = fitting(min(wanted, key=lambda entry: entry.distance(problem)), problem)
    if strategy is None and "library" in among and loads_one_by_one(problem, entry):
        return dataclasses.replace(entry, strategy="library", measured=False)
    return entry


def loads_one_by_one(problem: Problem, entry: Entry) -> bool:
    """Whether 16-bit numbers cannot be loaded 16 bytes at a time, which no tile makes up for; not
    asked where these very sizes were measured."""
    if problem.dtype.itemsize != 2 or kind(problem) not in ("pointwise", "conv"):
        return False
    if entry.measured and entry.distance(problem) == 0:
        return False
    by_descriptors = entry.tile.descriptors and problem.pointwise
    multiple = CHUNK if by_descriptors or entry.strategy in BY_CUDA else ALIGNED
    return problem.neurons % multiple > 0 or problem.channels % multiple > 0


def fitting(entry: Entry, problem: Problem) -> Entry:
    """The entry, its tile of one tap where the rows of the kernel are not made of its taps, packed
    where the layer would be folded and cannot be, and of one block where others had no neurons."""
    tile, few = entry.tile, kind(problem) == "packed"
    if tile.cluster > 1 and problem.neurons <= tile.block_k // tile.cluster:
        tile = dataclasses.replace(tile, block_k=tile.block_k // tile.cluster, cluster=1)
    if few and not tile.packed:
        tile = dataclasses.replace(tile, taps=1, packed=not problem.foldable)
    elif problem.kernel_size[1] % tile.taps:
        tile = dataclasses.replace(tile, taps=1)
    return dataclasses.replace(entry, tile=tile)
