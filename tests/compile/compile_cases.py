"""Which layers reach every kernel and every tile of the shipped tables, and their launches.

And those for which a tuner folds few channels, as long as no table has one.
A case is a tile and a way to use it; its sizes follow from the tile, its tensors have no memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ghl_kernels.fold import Fold
from ghl_kernels.problem import Problem
from ghl_kernels.triton import fused, merge, store_u, stored
from ghl_kernels.triton.fold import fold_images
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.patches import empty_patches, lay_patches
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import SHIPPED, Entry, Table, Tile
from ghl_kernels.tuning.tune import TILES

ARCHITECTURES = (80, 90, 100)
DTYPES = {16: torch.bfloat16, 32: torch.float32}
ROWS = 4096
WGRAD = ("linear_wgrad_kernel", "conv_wgrad_kernel", "depthwise_wgrad_kernel")
OTHERS = ("statistics_kernel", "store_u_kernel", "sum_splits_kernel", "measure_kernel")
OTHERS += ("combine_kernel", "foreach_measure_kernel", "foreach_combine_kernel", "fold_kernel")
OTHERS += ("patches_kernel",)
FORMS = {"triton": {"in_tile", "statistics"}, "triton_stored": {"stored"}}
EVERY_FORM = set().union(*FORMS.values())


@dataclasses.dataclass(frozen=True)
class Case:
    """form: u from whole rows `in_tile`, from row `statistics`, or `stored`; `rest`: the kernels
    without a tile. aligned: sizes and strides are multiples of 16."""

    arch: int
    kind: str
    bits: int
    tile: Tile
    form: str
    aligned: bool = True
    half: bool = False  # float16 instead of bfloat16
    sum_u: bool = False
    precision: str = "tf32"
    channels_first: bool = False
    kernel: int = 3

    def __str__(self) -> str:
        t = self.tile
        words = [f"sm{self.arch}", self.kind, f"{self.bits}bit", self.form]
        words += [f"{t.block_m}x{t.block_k}x{t.block_c} w{t.warps} s{t.stages}"]
        words += [name for name in ("packed", "descriptors") if getattr(t, name)]
        words += [f"taps{t.taps}"] if t.taps > 1 else []
        words += [name for name in ("half", "sum_u", "channels_first") if getattr(self, name)]
        words += [f"kernel{self.kernel}"] if self.kernel != 3 else []
        words += [self.precision] if self.bits == 32 else []
        return " ".join([*words, "aligned" if self.aligned else "unaligned"])

    @property
    def kernels(self) -> tuple[str, ...]:
        return OTHERS if self.form == "rest" else WGRAD

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.half else DTYPES[self.bits]

    @property
    def neurons(self) -> int:
        several = self.form != "in_tile"
        return self.tile.block_k * (1 + several) - (not self.aligned)

    @property
    def channels(self) -> int:
        if self.kind == "packed":
            return 3
        return 2 * self.tile.block_c - (not self.aligned)


def ways(arch: int, kind: str, bits: int, tile: Tile, forms: set[str]) -> Iterator[Case]:
    """The ways in which layers use a tile, of these forms, each different to the compiler."""
    return (case for case in every_way(arch, kind, bits, tile) if case.form in forms)


def every_way(arch: int, kind: str, bits: int, tile: Tile) -> Iterator[Case]:

    def case(form: str, **options: Any) -> Case:
        return Case(arch, kind, bits, tile, form, **options)

    yield case("statistics")
    yield case("statistics", aligned=False)
    yield case("stored")
    if kind == "depthwise":
        return
    yield case("in_tile")
    if kind == "packed" and not tile.packed:
        return
    if bits == 16:
        yield case("statistics", sum_u=True)
        yield case("stored", half=True) if tile.packed else case("in_tile", half=True)
    else:
        yield case("statistics", precision="ieee")
    if tile.descriptors:
        without = dataclasses.replace(tile, descriptors=False)
        yield dataclasses.replace(case("in_tile"), tile=without)
    if tile.packed:
        yield case("in_tile", channels_first=True)
    if tile.taps > 1:
        yield case("in_tile", kernel=5)


def folded_tiles(bits: int) -> list[Tile]:
    """Those of the tuner's; their sizes are a Hopper's."""
    listed = [Tile(*shape, **options) for shape, options in TILES["packed", bits]]
    return [tile for tile in listed if not tile.packed]


def tabled(arch: int) -> Iterator[tuple[str, int, Tile, set[str]]]:
    """Kind, bits and tile of a shipped table's entries, each once, and the forms they are used in.

    One of a computed table may be taken in any; one that was measured is where it was the fastest,
    however many of its programs fit a multiprocessor.
    """
    table = Table.read(SHIPPED / f"sm{arch}.json")
    programs: dict[tuple[str, int, Tile], int] = {}
    forms: dict[tuple[str, int, Tile], set[str]] = {}
    for entry in table.entries:
        if entry.strategy in FORMS:
            key = entry.kind, entry.bits, dataclasses.replace(entry.tile, programs=0)
            programs[key] = 1 if table.measured else max(entry.tile.programs, programs.get(key, 0))
            used = FORMS[entry.strategy] if table.measured else EVERY_FORM
            forms.setdefault(key, set()).update(used)
    for (kind, bits, tile), most in programs.items():
        yield kind, bits, dataclasses.replace(tile, programs=most), forms[kind, bits, tile]


def cases() -> list[Case]:
    """Every case once, those of one tile side by side."""
    found: dict[Case, None] = {}
    for arch in ARCHITECTURES:
        for kind, bits, tile, forms in tabled(arch):
            found |= dict.fromkeys(ways(arch, kind, bits, tile, forms))
        for bits in DTYPES:
            for tile in folded_tiles(bits) if arch == 90 else ():
                found |= dict.fromkeys(ways(arch, "packed", bits, tile, EVERY_FORM))
            found[Case(arch, "pointwise", bits, Tile(64, 64, 64, 4, 3, programs=8), "rest")] = None
    return list(found)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def empty_like(t: Tensor) -> Tensor:
    """Another with its strides."""
    return torch.empty_like(t)


def images(case: Case, channels: int, size: int) -> Tensor:
    t = empty(ROWS // 256, channels, size, size, dtype=case.dtype)
    return t if case.channels_first else t.contiguous(memory_format=torch.channels_last)


Call = tuple[Callable[..., Any], tuple[Tensor, ...]]


def entry_of(case: Case) -> Entry:
    return Entry(case.kind, case.bits, ROWS, 1, 1, "triton", case.tile)


def pair_of(case: Case) -> Call:
    """The pair of a layer whose sizes follow from the tile, as a function of x, y, g and w."""
    pair = (stored if case.form == "stored" else fused).pair
    wanted = "softmax", "sums" if case.sum_u else "rows"
    if case.kind == "pointwise":
        y = empty(ROWS, case.neurons, dtype=case.dtype)
        x = empty(ROWS, case.channels, dtype=case.dtype)
        w = empty(case.neurons, case.channels, dtype=case.dtype)
        problem = Problem.of_linear(x, w, *wanted)
    else:
        groups, channels = (case.neurons, 1) if case.kind == "depthwise" else (1, case.channels)
        x = images(case, groups * channels, 16 + case.kernel - 1)
        y = images(case, case.neurons, 16).contiguous(memory_format=torch.channels_last)
        w = empty(case.neurons, channels, case.kernel, case.kernel, dtype=case.dtype)
        if not case.channels_first:
            w = w.contiguous(memory_format=torch.channels_last)
        problem = Problem.of_conv2d(x, y, y, w, (1, 1), (0, 0), (1, 1), groups, *wanted)
    return lambda *tensors: pair(problem, *tensors, 1.0), (x, y, empty_like(y), w)


def rest_of(case: Case) -> Iterator[Call]:
    """Rows in a tile and longer ones, a layer's merge and that of two layers, a folded x."""
    for neurons in (1000, 5000):
        y = empty(ROWS, neurons, dtype=case.dtype)
        yield lambda y: [fused.logsumexp(y, 1.0, 1)], (y,)
        for competition in ("softmax", "softhebb"):
            yield functools.partial(stored_u, competition=competition), (y,)
    sums = empty(64, 576), empty(64, 576), empty(65), empty(64, 576, dtype=case.dtype)
    for rule in (("oja", "sign", "absmax"), ("instar", "hebb", "mean")):
        yield functools.partial(merged, rule=rule), sums
    for stride in ((1, 1), (2, 2), (3, 3)):
        layer = Problem(ROWS, 64, 3, case.dtype, (7, 7), stride, padding=(3, 3))
        shape = Fold.of(layer).shape(ROWS // 256, (10, 10))
        fold = functools.partial(folded, shape=shape, padding=layer.padding)
        yield fold, (images(case, 3, 32),)
    for channels in (3, 64):
        yield laid, (images(case, channels, 18),)


def stored_u(y: Tensor, competition: str) -> list[Tensor]:
    return [store_u.store_u(y, competition, 1.0)]


def merged(*sums: Tensor, rule: tuple[str, str, str]) -> tuple[Tensor, ...]:
    return merge.merge(*sums, *rule)


def folded(x: Tensor, shape: Any, padding: Any) -> list[Tensor]:
    return [fold_images(x, shape, padding)]


def laid(x: Tensor) -> list[Tensor]:
    """Patches of a 3×3 convolution, in both memory orders of a weight."""
    layer = Problem(ROWS, 64, x.shape[1], x.dtype, (3, 3))
    patches = empty_patches(ROWS, layer, x)
    for channels_last in (True, False):
        lay_patches(patches, x, 0, ROWS, layer, (16, 16), channels_last)
    return [patches]


def launch_foreach(case: Case) -> None:
    """The merge of two layers, whose addresses are no parameters."""
    sums = empty(64, 576), empty(64, 576), empty(65), empty(64, 576, dtype=case.dtype)
    for rule in (("oja", "sign", "absmax"), ("instar", "hebb", "mean")):
        foreach_merge(*([t, t] for t in sums), *rule)


def calls_of(case: Case) -> Iterator[Call]:
    """What a case calls, with precisions and tile to be set."""
    if case.form == "rest":
        yield from rest_of(case)
    yield pair_of(case)


@contextlib.contextmanager
def used(case: Case) -> Iterator[None]:
    """Inside, layers take the case's tile and its precision of products."""
    torch.backends.cuda.matmul.fp32_precision = case.precision
    torch.backends.cudnn.conv.fp32_precision = case.precision
    with tiles.use(entry_of(case)):
        yield


def launch_case(case: Case) -> None:
    with used(case):
        for call, tensors in calls_of(case):
            call(*tensors)
        if case.form == "rest":
            launch_foreach(case)
