"""Tiles so small that a small layer reaches every branch of a kernel, and how a test has them used.

A `Form` is a tile and a number of splits; the layers beside it are those whose tails, tiles and
splits it makes.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton

from ghl_kernels import dispatch, splits
from ghl_kernels.problem import Problem
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import Entry, Table, Tile

nearest = tiles.nearest.__wrapped__  # without a memory that outlives a test
KINDS = ("pointwise", "conv", "packed", "depthwise")


@dataclasses.dataclass(frozen=True)
class Form:
    """Blocks of rows, neurons and inputs; of depthwise layers, 8 rows and 4 taps.

    splits: as many as the rows give, whatever the workspace; None leaves the kernels' own choice.
    folded: layers of few channels that can be are folded.
    """

    block_m: int = 16
    block_k: int = 16
    block_c: int = 16
    splits: int | None = 1
    taps: int = 1
    packed: bool = False
    descriptors: bool = False
    folded: bool = False

    def tile(self, kind: str) -> Tile:
        return Tile(
            block_m=8 if kind == "depthwise" else self.block_m,
            block_k=self.block_k,
            block_c=4 if kind == "depthwise" else self.block_c,
            warps=4,
            stages=2,
            programs=8,
            taps=self.taps if kind == "conv" else 1,
            packed=self.packed or (kind == "packed" and not self.folded),
            descriptors=self.descriptors,
        )

    def table(self) -> Table:
        """An entry of this form for each kind, number of bits and strategy."""
        entries = (
            Entry(kind, bits, 64, 16, 16, strategy, self.tile(kind))
            for kind in KINDS
            for bits in (16, 32)
            for strategy in (*tiles.BY_TRITON, *tiles.BY_PATCHES)
        )
        return Table("small", None, tuple(entries))

    def split_rows(self, problem: Problem, tile: Tile, device: object) -> tuple[int, int]:
        """`splits.split_rows` without its limits."""
        rows = triton.cdiv(triton.cdiv(problem.rows, self.splits), tile.block_m) * tile.block_m
        return triton.cdiv(problem.rows, rows), rows

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every layer takes this form until the test is over."""
        table = self.table()
        monkeypatch.setattr(tiles, "table", lambda device: table)
        monkeypatch.setattr(tiles, "nearest", nearest)
        if self.splits is not None:
            monkeypatch.setattr(splits, "split_rows", self.split_rows)


def compiled() -> tuple[str, ...]:
    """The implementation compiled ahead of time, where there is a GPU that its library fits."""
    if not torch.cuda.is_available():
        return ()
    return () if dispatch.unavailable("cuda", torch.empty(0, device="cuda"), None) else ("cuda",)


COMPILED = compiled()

ONE_SPLIT = Form()
ONE_TILE = Form(block_k=32, block_c=32)  # of a small layer, whose rows are several all the same
MANY_SPLITS = Form(splits=3)
WHOLE_ROWS = Form(block_k=64, block_c=32)  # a row of y fits in a tile
WHOLE_ROWS_SPLIT = Form(block_k=64, block_c=32, splits=3)
DESCRIPTORS = Form(descriptors=True, splits=2)
DESCRIPTORS_WHOLE_ROWS = Form(block_k=64, block_c=32, descriptors=True)
THREE_TAPS = Form(taps=3, splits=2)
THREE_TAPS_WHOLE_ROWS = Form(taps=3, block_k=64, block_c=32)
PACKED = Form(packed=True, block_c=32, splits=2)
PACKED_WHOLE_ROWS = Form(packed=True, block_k=64, block_c=64)
FOLDED = Form(folded=True, block_c=32, splits=2)
FOLDED_WHOLE_ROWS = Form(folded=True, block_k=64, block_c=64)
