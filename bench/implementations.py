"""The names under which the update of a case is measured, ours and the baselines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ghl_kernels
from bench import baselines
from bench.cases import Case
from ghl_kernels import Rule

Update = Callable[[Case, Tensor, Tensor, Tensor, Tensor], Tensor]


def baseline(formula: Callable[..., Tensor]) -> Update:
    def update(case: Case, x: Tensor, y: Tensor, g: Tensor, w: Tensor) -> Tensor:
        return formula(x, y, g, w, case.padding, case.tau)

    return update


def ghl(case: Case, x: Tensor, y: Tensor, g: Tensor, w: Tensor) -> Tensor:
    rule = Rule(tau=case.tau)
    arguments = rule.competition, rule.tau, rule.decay, rule.gate, rule.normalize
    if case.size == 1:
        x, y, g, w = (t.flatten(1) for t in (x, y, g, w))
        update = torch.ops.ghl_kernels.linear_update(x, y, g, w, *arguments)[0]
        return update[:, :, None, None]
    padding = [case.padding] * 2
    return torch.ops.ghl_kernels.conv2d_update(
        x, y, g, w, [1, 1], padding, [1, 1], 1, *arguments
    )[0]  # fmt: skip


def ghl_composed(case: Case, x: Tensor, y: Tensor, g: Tensor, w: Tensor) -> Tensor:
    with ghl_kernels.force("composed"):
        return ghl(case, x, y, g, w)


IMPLEMENTATIONS: dict[str, Update] = {
    "ghl": ghl,
    "ghl.composed": ghl_composed,
    "authors": baseline(baselines.authors),
    "natural": baseline(baselines.natural),
    "natural.compiled": baseline(torch.compile(baselines.natural, dynamic=False)),
    "trick": baseline(baselines.trick),
}
