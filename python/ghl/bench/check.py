"""Whether a layer's result is right, before its time is worth reporting.

The truth is composed of PyTorch's operators in float32 without TF32, from the same x, y, g and w;
`ghl_kernels.reference` in float64, which the tests hold that to, would take minutes here.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ghl.bench.clock import precision
from ghl.bench.layers import Layer
from ghl_kernels import composed

TOLERANCE = {"bfloat16": 1e-2, "tf32": 3e-3, "float32": 2e-4}  # ||out - exact|| / ||exact||
LARGEST = 10  # the worst number may be off by this many tolerances of the typical one
UPDATE = 3  # H is a difference: its error is a few times that of H0


@dataclasses.dataclass(frozen=True)
class Expected:
    """G, H0 and the update of a layer under the rule `ghl`, in float32."""

    G: Tensor
    H0: Tensor
    update: Tensor

    @classmethod
    def of(cls, layer: Layer, tensors: tuple[Tensor, ...]) -> Expected:
        x, y, g, w = (t.float() for t in tensors)
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False  # not worth a search for one call
        try:
            with precision("float32"):
                sums = composed.pair(layer.problem(x, y, g, w), x, y, g, w, layer.tau)
        finally:
            torch.backends.cudnn.benchmark = benchmark
        update = composed.merge(*sums, w, "oja", "sign", "absmax")[0]
        return cls(sums[0], sums[1], update)


def distance(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """||out - exact|| / ||exact||, and the largest difference in units of the typical number."""
    difference, norm = out.float() - exact, exact.norm()
    typical = norm / exact.numel() ** 0.5
    return (difference.norm() / norm).item(), (difference.abs().amax() / typical).item()


def wrong_sums(G: Tensor, H0: Tensor, expected: Expected, mode: str) -> str | None:
    """What is wrong with a pair, None if nothing is; written so that NaN is wrong."""
    tolerance = TOLERANCE[mode]
    for name, out, exact in (("G", G, expected.G), ("H0", H0, expected.H0)):
        relative, largest = distance(out, exact)
        if not (relative <= tolerance and largest <= LARGEST * tolerance):
            return (
                f"{name} is off by {relative:.1e} (largest {largest:.1e}), "
                f"must be within {tolerance:.0e} ({LARGEST * tolerance:.0e})"
            )
    return None


def wrong_update(update: Tensor, expected: Expected, mode: str) -> str | None:
    """What is wrong with an update where rounding cannot have decided the sign of G."""
    tolerance, exact = UPDATE * TOLERANCE[mode], expected.update
    typical = expected.G.norm() / expected.G.numel() ** 0.5
    certain = expected.G.abs() > LARGEST * TOLERANCE[mode] * typical
    out = update.reshape(exact.shape)
    relative, _ = distance(out[certain], exact[certain])
    if not relative <= tolerance:
        return f"the update is off by {relative:.1e}, must be within {tolerance:.0e}"
    if not bool(torch.isfinite(out).all()):
        return "the update has numbers that are not finite"
    return None
