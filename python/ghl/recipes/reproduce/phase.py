"""Noise against weight decay (arXiv 2505.18069): where learning turns from anti-Hebbian to Hebbian.

The grid σ × γ of MLP students, the line on which their alignment is zero, its exponent with a
confidence interval, and the case of linear regression, where all of it has a closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghl.recipes.reproduce.sre import Students, train


def cell(
    rule: str, lr: float, steps: int, noise: float, decays: Sequence[float], seeds: Sequence[int]
) -> dict[str, Any]:
    """One σ: students of every γ in `decays` and every seed; cosines by γ, then seed."""
    stacked = [s for _ in decays for s in seeds]
    decay = torch.tensor([d for d in decays for _ in seeds])
    settings = Students(rule=rule, lr=lr, steps=steps)
    found = train(settings, stacked, decay, torch.full_like(decay, noise))
    shape = (len(decays), len(seeds))
    return {k: torch.tensor(v).view(shape).tolist() for k, v in found.items()}


def crossing(decays: Sequence[float], cosines: Sequence[float]) -> float | None:
    """The γ at which the alignment turns positive, by interpolation in log γ; None if nowhere.

    Where sampling makes it turn several times, the geometric mean of the first and the last.
    """
    found = []
    pairs = list(zip(decays, cosines, strict=True))
    for (a, low), (b, high) in pairwise(pairs):
        if low < 0 <= high:
            share = low / (low - high)
            found.append(np.log(a) + share * (np.log(b) - np.log(a)))
    return float(np.exp((found[0] + found[-1]) / 2)) if found else None


def exponent(noises: Sequence[float], boundaries: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of log γ against log σ by least squares."""
    slope, intercept = np.polyfit(np.log(noises), np.log(boundaries), 1)
    return float(slope), float(intercept)


class Boundary:
    """The points (σ, γ) at which cosines (σ, γ, seeds) turn positive, for any choice of seeds."""

    def __init__(
        self, noises: Sequence[float], decays: Sequence[float], cosines: np.ndarray
    ) -> None:
        self.noises, self.decays, self.cosines = noises, decays, cosines

    def of(self, seeds: Any) -> tuple[list[float], list[float]]:
        mean = self.cosines[:, :, seeds].mean(2)
        both = [
            (noise, found)
            for noise, row in zip(self.noises, mean, strict=True)
            if (found := crossing(self.decays, row)) is not None
        ]
        return [noise for noise, _ in both], [found for _, found in both]


def fit(boundary: Boundary, without_noise: Boundary, resamples: int = 2000) -> dict[str, Any]:
    """The boundary γ(σ) and its exponent, and the exponent of γ(σ) − γ(0), each with 95 %.

    without_noise: of σ = 0 alone, where the noise of batches has a boundary of its own. Intervals
    are from resampling seeds with replacement (percentiles). Levels of noise without a crossing on
    the grid are left out and named. Raises ValueError if fewer than 3 are left, or γ(0) is not on
    its grid.
    """
    seeds = boundary.cosines.shape[2]
    everyone = np.arange(seeds)
    noises, decays = boundary.of(everyone)
    _, floors = without_noise.of(everyone)
    if len(noises) < 3:
        raise ValueError(
            f"the boundary crosses the grid at {len(noises)} noise levels, must at 3 at least: "
            "widen the range of decays"
        )
    if not floors:
        raise ValueError("without noise there is no crossing on the grid: widen its decays")
    generator = np.random.default_rng(0)
    slopes = []
    for _ in range(resamples):
        chosen = generator.integers(0, seeds, seeds)
        levels, found = boundary.of(chosen)
        _, floor = without_noise.of(chosen)
        if len(levels) >= 3 and floor and min(found) > floor[0]:
            above = [value - floor[0] for value in found]
            slopes.append((exponent(levels, found)[0], exponent(levels, above)[0]))
    plain, above = np.percentile(slopes, [2.5, 97.5], axis=0).T.tolist()
    slope, intercept = exponent(noises, decays)
    return {
        "noise": noises,
        "boundary": decays,
        "exponent": slope,
        "interval": plain,
        "factor": float(np.exp(intercept)),
        "floor": floors[0],
        "exponent_above": exponent(noises, [d - floors[0] for d in decays])[0],
        "interval_above": above,
        "left_out": [noise for noise in boundary.noises if noise not in noises],
    }


def regression_alignment(x: Tensor, y: Tensor, v: Tensor, noise: float) -> Tensor:
    """Expected ⟨S, B⟩ of wᵀx with w = v + σε for ℓ = ½(wᵀx − y)², in closed form.

    −‖x‖² [(vᵀx)² + σ²‖x‖² − vᵀx·y] for each row of x (M, C), y (M); ε standard normal.
    """
    x2, vx = x.square().sum(1), x @ v
    return -x2 * (vx.square() + noise**2 * x2 - vx * y)
