"""The implementation `library_patches`: u is written once by Triton, and cuBLAS has both products,
with patches of x laid along the rows, which its kernels for TF32 multiply faster than as they lie.

For float32 with TF32 and one group. Patches are laid for some rows at a time, a quarter of u's
numbers or 64 MiB of them, which comes on top of u and of the splits' sums; the sums of one part
after another are added up in the same order every time.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ghl_kernels import layout
from ghl_kernels.composed import update_of
from ghl_kernels.pairs import Kernels, Task, pair_by
from ghl_kernels.problem import Problem
from ghl_kernels.splits import Partials
from ghl_kernels.triton.foreach_merge import foreach_merge
from ghl_kernels.triton.logsumexp import logsumexp
from ghl_kernels.triton.merge import merge
from ghl_kernels.triton.patches import empty_patches, lay_patches
from ghl_kernels.triton.split_k import sum_splits
from ghl_kernels.triton.stored import stored_u
from ghl_kernels.tuning import tiles
from ghl_kernels.tuning.tiles import ALIGNED, Tile

__all__ = ["foreach_merge", "logsumexp", "merge", "pair", "update"]

SMALLEST, LARGEST = 2**24, 2**25  # numbers of patches: 64 MiB that any GPU has, 128 are enough
SHARE = 4  # of u's numbers
FEWEST_ROWS = 512  # that a split is worth: products over few rows were slow on an H200
CHUNK = 4  # numbers of float32 that wide loads begin at a multiple of


def tile_of(problem: Problem, w: Tensor) -> Tile:
    """By which the rows are split, whatever the layer."""
    return tiles.OF_PATCHES


def rows_at_once(problem: Problem, splits: int) -> int:
    """One of equal parts of the rows: ALIGNED rows for each split, or a multiple."""
    of_u = problem.rows * problem.neurons // SHARE
    most = min(LARGEST, max(SMALLEST, of_u)) // max(1, problem.columns)
    parts = max(1, -(-problem.rows // max(1, most)))
    step = ALIGNED * splits
    return min(problem.rows, -(-problem.rows // (parts * step)) * step)


def multiply(sums: Tensor, signal: Tensor, patches: Tensor, beta: int) -> None:
    """sums (splits, K, columns) = beta · sums + the products of signal (rows, K) with patches
    (columns, rows): each of the splits has its share of the rows, the first what is left; the last
    have none where there are few."""
    rows = signal.shape[0]
    splits = max(1, min(sums.shape[0], rows // FEWEST_ROWS))
    share = rows if splits == 1 else rows // splits // CHUNK * CHUNK
    shared = splits * share
    signals = signal[:shared].unflatten(0, (splits, share)).mT
    columns = patches[:, :shared].unflatten(1, (splits, share)).permute(1, 2, 0)
    sums[:splits].baddbmm_(signals, columns, beta=beta)
    if splits < sums.shape[0] and beta == 0:
        sums[splits:].zero_()
    if shared < rows:
        sums[0].addmm_(signal[shared:].mT, patches[:, shared:rows].mT)


def as_matrices(sums: Tensor, partials: Partials) -> Tensor:
    """Parts, or results of one, as (splits, neurons, columns)."""
    if partials.splits == 1:
        return layout.as_rows(sums, partials.channels_last)[None]
    return sums.view(partials.splits, partials.results.G.shape[0], -1)


def of_images(task: Task, partials: Partials) -> None:
    """Fill `partials` from images x (N, C, H, W) and matrices u and g (M, K)."""
    problem, rows = task.problem, rows_at_once(task.problem, partials.splits)
    patches = empty_patches(rows, problem, task.x)
    G, H0 = (as_matrices(sums, partials) for sums in (partials.sums.G, partials.sums.H0))
    starts = itertools.chain(range(0, problem.rows, rows), [problem.rows])
    for first, end in itertools.pairwise(starts):
        lay_patches(
            patches, task.x, first, end - first, problem, task.out_size, partials.channels_last
        )
        for sums, signal in ((G, task.g), (H0, task.y)):
            multiply(sums, signal[first:end], patches, beta=int(first > 0))
    if problem.sum_u:
        sum_u(task.y, partials)


def sum_u(u: Tensor, partials: Partials) -> None:
    """The first part has the sums of all rows."""
    neurons = u.shape[1]
    parts = partials.sums.totals[: partials.splits * neurons].view(partials.splits, neurons)
    parts.zero_()
    parts[0].copy_(torch.sum(u, 0))


def of_rows(task: Task, partials: Partials) -> None:
    of_images(task._replace(x=task.x[:, :, None, None]), partials)


pair = pair_by(Kernels(tile_of, stored_u, of_rows, of_images, sum_splits))
update = update_of(pair, merge)
