"""In which dtype the forwards of all ranks use a weight, as which every rank merges with it.

A rank knows it of what it has used itself; updates made with other weights would differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ghl import ranks
from ghl.deferred.held import HeldSums
from ghl.sums import RawSums


def agree(weights: Mapping[str, nn.Parameter], group: Any) -> None:
    """Have every rank learn the dtypes of whole weights that it has not used and others have.

    Raises RuntimeError, on every rank, for a weight that ranks use in several.
    """
    present = {name: RawSums.present(weight) for name, weight in weights.items()}
    whole = {n: s for n, s in present.items() if isinstance(s, HeldSums) and not s.sharded}
    mine = {name: sums.used_in for name, sums in whole.items()}
    everyone = ranks.gather(mine, group, weights.values())
    for name, sums in whole.items():
        used = {theirs.get(name) for theirs in everyone} - {None}
        if len(used) > 1:
            every = " and in ".join(sorted(map(str, used)))
            raise RuntimeError(f"ranks differ, must use a weight in one dtype: {name!r} in {every}")
        sums.used_in = used.pop() if used else None


def assumed(held: Sequence[tuple[nn.Parameter, HeldSums]]) -> dict[torch.dtype, torch.dtype]:
    """By the dtype of a weight that this rank has not used: autocast's, as of its others."""
    seen: dict[torch.dtype, Counter[torch.dtype]] = {}
    for weight, sums in held:
        if sums.used_in is not None:
            seen.setdefault(weight.dtype, Counter())[sums.used_in] += 1
    return {dtype: used.most_common(1)[0][0] for dtype, used in seen.items()}
