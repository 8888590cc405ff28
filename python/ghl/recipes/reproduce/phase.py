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


def fit(
    noises: Sequence[float], decays: Sequence[float], cosines: np.ndarray, resamples: int = 2000
) -> dict[str, Any]:
    """The boundary of cosines (σ, γ, seeds) and its exponent with a 95 % interval.

    The interval is from resampling seeds with replacement (percentiles of the bootstrap). σ without
    a crossing on the grid are left out and named.
    """
    generator = np.random.default_rng(0)
    seeds = cosines.shape[2]

    def of(chosen: Any) -> tuple[list[float], list[float]]:
        mean = cosines[:, :, chosen].mean(2)
        both = [(s, c) for s, row in zip(noises, mean, strict=True) if (c := crossing(decays, row))]
        return [s for s, _ in both], [c for _, c in both]

    found, boundaries = of(np.arange(seeds))
    if len(found) < 3:
        raise ValueError(
            f"the boundary crosses the grid at {len(found)} noise levels, must at 3 at least: "
            "widen the range of decays"
        )
    slope, intercept = exponent(found, boundaries)
    slopes = []
    for _ in range(resamples):
        sigma, gamma = of(generator.integers(0, seeds, seeds))
        if len(sigma) >= 3:
            slopes.append(exponent(sigma, gamma)[0])
    low, high = np.percentile(slopes, [2.5, 97.5])
    return {
        "noise": found,
        "boundary": boundaries,
        "exponent": slope,
        "interval": [float(low), float(high)],
        "factor": float(np.exp(intercept)),
        "left_out": [s for s in noises if s not in found],
    }


def regression_alignment(x: Tensor, y: Tensor, v: Tensor, noise: float) -> Tensor:
    """Expected ⟨S, B⟩ of wᵀx with w = v + σε for ℓ = ½(wᵀx − y)², in closed form.

    −‖x‖² [(vᵀx)² + σ²‖x‖² − vᵀx·y] for each row of x (M, C), y (M); ε standard normal.
    """
    x2, vx = x.square().sum(1), x @ v
    return -x2 * (vx.square() + noise**2 * x2 - vx * y)
