"""In which dtype the forwards of all ranks use a weight, as which every rank merges with it.

Updates made with other weights would differ. A rank that has not used one since the last step is
told by the others, beside the totals; not of a shard, which FSDP has all ranks use.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghl import ranks
from ghl.deferred.held import HeldSums
from ghl.sums import RawSums
from ghl_kernels.checks import DTYPES


def sent(dtype: torch.dtype | None, like: Tensor) -> Tensor:
    """For each of DTYPES a number, which are added up over ranks: 1 for the one in which this rank
    has used a weight, None where it has not. like: of which dtype and device."""
    return _sent(dtype, like.dtype, like.device)


@functools.cache
def _sent(dtype: torch.dtype | None, sum_dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([float(one is dtype) for one in DTYPES], dtype=sum_dtype, device=device)


def told(numbers: Sequence[float]) -> torch.dtype | None:
    """The dtype that the sums of what ranks have `sent` tell."""
    return next((dtype for dtype, n in zip(DTYPES, numbers, strict=True) if n), None)


def check_agreed(weights: Mapping[str, nn.Parameter], group: Any) -> None:
    """Raise RuntimeError, on every rank, for a whole weight that ranks have used in several."""
    present = {name: RawSums.present(weight) for name, weight in weights.items()}
    mine = {
        name: sums.used_in
        for name, sums in present.items()
        if isinstance(sums, HeldSums) and not sums.sharded
    }
    everyone = ranks.gather(mine, group, weights.values())
    for name in mine:
        used = {theirs.get(name) for theirs in everyone} - {None}
        if len(used) > 1:
            every = " and in ".join(sorted(map(str, used)))
            raise RuntimeError(f"ranks differ, must use a weight in one dtype: {name!r} in {every}")
