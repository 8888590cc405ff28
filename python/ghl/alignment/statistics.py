"""From sums of a step to what a Monitor reports: a step keeps products, a report makes cosines.

Cosines, inner products, norms and shares are defined here; how the sums came about is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghl import ranks
from ghl.alignment.sums import Sums

PARTS = ("batch", "sample", "update")
NUMBERS = ("weight_norm", "hebbian_share", "anti_hebbian_share", "sign_flips")
FIELDS = *PARTS, *NUMBERS


@dataclass(eq=False)
class Part:
    """What cosines and an inner product are made of, on the device; reports make them.

    neurons (3, K), layer (3): sums, of which the first is the inner product's and `ratio` makes a
    cosine of all three. rows: their number. The inner product is layer[0] factor /
    rows^powers_of_rows; cosines have the sign of the factor.
    """

    neurons: Tensor
    layer: Tensor
    rows: float | Tensor
    ratio: Callable[[Tensor, Tensor, Tensor], Tensor]
    factor: float = 1.0
    powers_of_rows: int = 1


class Ratios(NamedTuple):
    """A part's first sum, and what `ratio` makes of a layer's sums and of its neurons' (K)."""

    inner: float
    layer: float
    neurons: Tensor


@dataclass
class Measurement:
    """Everything one step says of one weight; what is missing has its reason in `gaps`."""

    step: int
    weight_norm: Tensor | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    sign_flips: tuple[Tensor, Tensor] | None = None
    gaps: dict[str, str] = field(default_factory=dict)
    elsewhere: Tensor | None = None  # how many ranks have a gap
    zeroed: Tensor | None = None  # whether weight.grad was zero where a backward had been

    def scalars(self) -> list[Tensor]:
        """All tensors of one number."""
        rows = [part.rows for part in self.parts.values() if isinstance(part.rows, Tensor)]
        others = (self.weight_norm, self.elsewhere, self.zeroed, *(self.sign_flips or ()))
        return rows + [t for t in others if t is not None]


def of_batch(
    signals: Sequence[Tensor], sums: Sequence[Sums], weights: Sequence[Tensor]
) -> list[Part]:
    """Each signal (K, ...) with its mean Hebbian direction; all of one dtype on one device.

    One pass over the weights' numbers: `merge` gives ⟨S, H⟩, ‖S‖² and ‖H‖² of every neuron. What
    it gives besides, S once more, is as large as the signals together.
    """
    if not signals:
        return []
    decay = sums[0].rule.decay
    if decay != "none":  # which alone reads weights: as the forward used them
        weights = [w.to(s.compute_dtype) for w, s in zip(weights, sums, strict=True)]
    directions = [s.H0 for s in sums if s.H0 is not None]
    _, neurons, layers = torch.ops.ghl_kernels.foreach_merge(
        [signal.to(H0.dtype) for signal, H0 in zip(signals, directions, strict=True)],
        directions, totals(sums), weights, decay, "gradient", "none",
    )  # fmt: skip
    return [
        Part(of_neurons, of_layer, s.rows, cosine)
        for of_neurons, of_layer, s in zip(neurons, layers, sums, strict=True)
    ]


def totals(sums: Sequence[Sums]) -> Sequence[Tensor]:
    """Σu and a number of rows (K + 1), as `merge` takes them: only `instar` reads Σu, and the
    number nothing without a normalisation."""
    H0 = sums[0].H0
    assert H0 is not None
    lengths = [s.shape[0] + 1 for s in sums]
    if sums[0].rule.decay != "instar":
        return H0.new_zeros(sum(lengths)).split(lengths)
    rows = H0.new_zeros(1)
    return torch.cat([t for s in sums if s.u_sum is not None for t in (s.u_sum, rows)]).split(
        lengths
    )


def of_samples(sums: Sums, mean_loss: bool) -> Part:
    """Means over rows, from the sums of `samples.measure`; 0 / 0 rows make NaN."""
    assert sums.neurons is not None and sums.layer is not None
    # a mean over rows has made every row's own gradient that many times smaller
    powers = 0 if mean_loss else 1
    return Part(sums.neurons.T, sums.layer, sums.rows, mean_cosine, sums.scale, powers)


def mean_cosine(inner: Tensor, cosines: Tensor, count: Tensor) -> Tensor:
    return cosines / count


def cosine(inner: Tensor, signal2: Tensor, hebbian2: Tensor) -> Tensor:
    """inner / (‖S‖ ‖B‖), at most 1 in magnitude; NaN where either is zero, or where its square is
    not finite, or so small that the squares of its parts may have vanished."""
    ratio = (inner / (signal2.sqrt() * hebbian2.sqrt())).clamp(-1, 1)
    return ratio.where(in_range(signal2) & in_range(hebbian2), float("nan"))


def in_range(square: Tensor) -> Tensor:
    limits = torch.finfo(square.dtype)
    return (square >= limits.tiny / limits.eps) & (square <= limits.max)


def flips(before: list[Tensor], now: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of signs (int8) that are 0 neither before nor now: equal less opposite ones, and all.

    Sums of products: comparing and counting takes a CPU several times as long. `before` is
    overwritten by the products.
    """
    if not before:
        return []
    torch._foreach_mul_(before, now)
    differences = [product.sum() for product in before]
    torch._foreach_mul_(before, before)
    return list(zip(differences, [product.sum() for product in before], strict=True))


def to_numbers(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """What `Monitor.report` gives for each layer; here, and only here, the host waits."""
    host = on_host([t for measurement in measurements for t in measurement.scalars()])
    ratios = ratios_of([part for m in measurements for part in m.parts.values()])
    return [numbers_of(measurement, host, ratios) for measurement in measurements]


def on_host(scalars: Sequence[Tensor]) -> dict[Tensor, float]:
    """Tensors () as numbers, with one wait for all of a dtype on a device."""
    found: dict[Tensor, float] = {}
    for indices in ranks.buckets(scalars):
        alike = [scalars[i] for i in indices]
        found |= zip(alike, torch.stack(alike).tolist(), strict=True)
    return found


def ratios_of(parts: Sequence[Part]) -> dict[Part, Ratios]:
    """Of every part, all of a kind at once."""
    kinds: dict[Any, list[Part]] = {}
    for part in parts:
        kinds.setdefault((part.ratio, part.layer.dtype, part.layer.device), []).append(part)
    found: dict[Part, Ratios] = {}
    for (ratio, *_), alike in kinds.items():
        neurons = torch.cat([part.neurons for part in alike], 1).cpu()
        layers = torch.stack([part.layer for part in alike], 1).cpu()
        of_neurons = ratio(*neurons).split([part.neurons.shape[1] for part in alike])
        columns = layers[0].tolist(), ratio(*layers).tolist(), of_neurons
        found |= zip(alike, map(Ratios, *columns), strict=True)
    return found


def numbers_of(
    measurement: Measurement, host: dict[Tensor, float], ratios: dict[Part, Ratios]
) -> dict[str, Any]:
    gaps = dict(measurement.gaps)
    if measurement.elsewhere is not None and host[measurement.elsewhere] > 0:
        gaps.setdefault("layer", "a gap on another rank")
    if measurement.zeroed is not None and host[measurement.zeroed]:
        gaps.setdefault(
            "layer",
            "weight.grad was zero when a second backward of the step came: if it was set to zero "
            "without an optimizer step, use zero_grad(set_to_none=True)",
        )
    result: dict[str, Any] = dict.fromkeys(FIELDS)
    result["step"] = measurement.step
    if measurement.weight_norm is not None:
        result["weight_norm"] = host[measurement.weight_norm]
    if "layer" not in gaps:
        for name, part in measurement.parts.items():
            rows = host[part.rows] if isinstance(part.rows, Tensor) else part.rows
            numbers, gap = part_to_numbers(part, ratios[part], rows)
            result[name] = numbers
            if gap:
                gaps[name] = gap
        result.update(shares(result["batch"] or result["sample"]))
        if measurement.sign_flips is not None:
            difference, both = (host[t] for t in measurement.sign_flips)
            if both:
                result["sign_flips"] = (both - difference) / (2 * both)
            else:
                gaps["sign_flips"] = "no entry of the gradient had a sign in both steps"
    result["gaps"] = gaps
    return result


def part_to_numbers(
    part: Part, ratios: Ratios, rows: float
) -> tuple[dict[str, Any] | None, str | None]:
    if not rows:
        return None, "the batch was empty"
    inner = part.factor * ratios.inner / rows**part.powers_of_rows
    if not math.isfinite(inner):
        return None, "the signal or the Hebbian direction holds NaN or infinity"
    sign = math.copysign(1, part.factor)
    value = sign * ratios.layer
    if value != value:
        return None, "there is no cosine: a norm is zero, or its square beyond the dtype's range"
    return {"cosine": value, "inner": inner, "neurons": sign * ratios.neurons}, None


def shares(part: dict[str, Any] | None) -> dict[str, float | None]:
    """The shares of neurons with a positive and with a negative cosine, of all neurons."""
    if part is None:
        return {"hebbian_share": None, "anti_hebbian_share": None}
    neurons = part["neurons"]
    return {
        "hebbian_share": int((neurons > 0).sum()) / len(neurons),
        "anti_hebbian_share": int((neurons < 0).sum()) / len(neurons),
    }
