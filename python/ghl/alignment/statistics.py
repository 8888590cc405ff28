"""From sums of a step to what a Monitor reports: tensors first, numbers when they are asked for.

Cosines, inner products, norms and shares are defined here; how the sums came about is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ghl.alignment.sums import Sums

PARTS = ("batch", "sample", "update")
FIELDS = (*PARTS, "weight_norm", "hebbian_share", "anti_hebbian_share", "sign_flips")


@dataclass
class Alignment:
    """Cosine and inner product of a signal with the Hebbian direction, on the device.

    cosine, inner: (); neurons: (K) cosines. NaN where a signal or a direction is zero.
    """

    cosine: Tensor
    inner: Tensor
    neurons: Tensor


@dataclass
class Measurement:
    """Everything one step says of one weight; what is missing has its reason in `gaps`."""

    step: int
    weight_norm: Tensor | None = None
    parts: dict[str, Alignment] = field(default_factory=dict)
    sign_flips: Tensor | None = None
    gaps: dict[str, str] = field(default_factory=dict)
    elsewhere: Tensor | None = None  # how many ranks have a gap
    zeroed: Tensor | None = None  # whether weight.grad was zero where a backward had been


def of_batch(
    signal: Tensor, sums: Sums, weight: Tensor, sign: int = 1, of_sum: bool = False
) -> Alignment:
    """Of sign · `signal` (K, ...) and the mean Hebbian direction.

    One pass over the weight's numbers: `merge` gives ⟨G, H⟩, ‖G‖² and ‖H‖² of every neuron.
    of_sum: the signal is a sum over rows and its mean is meant.
    """
    assert sums.H0 is not None
    rule, used = sums.rule, weight.to(sums.compute_dtype)
    _, neurons, layer = torch.ops.ghl_kernels.merge(
        signal.to(sums.H0.dtype), sums.H0, sums.totals(), used, rule.decay, "gradient", "none"
    )
    rows = sums.count(layer)
    cosines = sign * cosine(*torch.cat([neurons, layer[:, None]], 1))
    return Alignment(
        cosine=cosines[-1],
        inner=sign * layer[0] / (rows * rows if of_sum else rows),
        neurons=cosines[:-1],
    )


def of_samples(sums: Sums, mean_loss: bool) -> Alignment:
    """Means over rows, from the sums of `samples.measure`; 0 / 0 rows make NaN."""
    assert sums.neurons is not None and sums.layer is not None
    inner, cosines, count = sums.layer
    rows = sums.count(inner)
    return Alignment(
        cosine=cosines / count,
        # a mean over `rows` has made every row's own gradient that many times smaller
        inner=inner if mean_loss else inner / rows,
        neurons=sums.neurons[:, 1] / sums.neurons[:, 2],
    )


def cosine(inner: Tensor, signal2: Tensor, hebbian2: Tensor) -> Tensor:
    """inner / (‖S‖ ‖B‖), at most 1 in magnitude; NaN where either is zero, or where its square is
    not finite, or so small that the squares of its parts may have vanished."""
    ratio = (inner / (signal2.sqrt() * hebbian2.sqrt())).clamp(-1, 1)
    return ratio.where(in_range(signal2) & in_range(hebbian2), float("nan"))


def in_range(square: Tensor) -> Tensor:
    limits = torch.finfo(square.dtype)
    return (square >= limits.tiny / limits.eps) & (square <= limits.max)


def flips(before: Tensor, now: Tensor) -> Tensor:
    """The share of signs (int8), of those not 0 in either, that are opposite; NaN if there is none.

    Sums of products: comparing and counting takes a CPU several times as long.
    """
    product = before * now
    same_less_opposite, both = product.sum(), (product * product).sum()
    return (both - same_less_opposite) / (2 * both)


def to_numbers(measurement: Measurement) -> dict[str, Any]:
    """What `Monitor.report` gives for a layer; here, and only here, the host waits."""
    gaps = dict(measurement.gaps)
    if measurement.elsewhere is not None and measurement.elsewhere > 0 and "layer" not in gaps:
        gaps["layer"] = "a gap on another rank"
    if measurement.zeroed is not None and measurement.zeroed and "layer" not in gaps:
        gaps["layer"] = (
            "weight.grad was zero when a second backward of the step came: if it was set to zero "
            "without an optimizer step, use zero_grad(set_to_none=True)"
        )
    result: dict[str, Any] = dict.fromkeys(FIELDS)
    result["step"] = measurement.step
    if measurement.weight_norm is not None:
        result["weight_norm"] = float(measurement.weight_norm)
    if "layer" not in gaps:
        for name, part in measurement.parts.items():
            numbers, gap = part_to_numbers(part)
            result[name] = numbers
            if gap:
                gaps[name] = gap
        result.update(shares(result["batch"] or result["sample"]))
        if measurement.sign_flips is not None:
            rate = float(measurement.sign_flips)
            result["sign_flips"] = None if rate != rate else rate
            if rate != rate:
                gaps["sign_flips"] = "no entry of the gradient had a sign in both steps"
    result["gaps"] = gaps
    return result


def part_to_numbers(part: Alignment) -> tuple[dict[str, Any] | None, str | None]:
    inner, value = float(part.inner), float(part.cosine)
    if inner != inner or abs(inner) == float("inf"):
        return None, "the signal or the Hebbian direction holds NaN or infinity"
    if value != value:
        return None, "there is no cosine: a norm is zero, or its square beyond the dtype's range"
    return {"cosine": value, "inner": inner, "neurons": part.neurons.cpu()}, None


def shares(part: dict[str, Any] | None) -> dict[str, float | None]:
    """The shares of neurons with a positive and with a negative cosine, of all neurons."""
    if part is None:
        return {"hebbian_share": None, "anti_hebbian_share": None}
    neurons = part["neurons"]
    return {
        "hebbian_share": float((neurons > 0).double().mean()),
        "anti_hebbian_share": float((neurons < 0).double().mean()),
    }
