"""Layers as life brings them, their tensors' layouts, and how far off a result may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ghl_kernels import Problem, Rule, reference

Tensors = Sequence[Tensor]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def choices(rule: Rule) -> tuple[str, float, str, str, str]:
    """A rule as the operators take it; torch 2.11 cannot trace dataclasses.astuple."""
    return rule.competition, rule.tau, rule.decay, rule.gate, rule.normalize


@dataclasses.dataclass(frozen=True)
class Linear:
    rows: int
    inputs: int
    neurons: int

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Random x, y, g, w."""
        shapes = (self.rows, self.inputs), (self.rows, self.neurons), (self.rows, self.neurons)
        return [torch.randn(s).to(dtype) for s in (*shapes, (self.neurons, self.inputs))]

    def reference(self, tensors: Tensors, rule: Rule | str) -> reference.Update:
        return reference.linear_update(*tensors, rule)

    def pair(
        self, tensors: Tensors, rule: Rule, totals: str = "sums"
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.ghl_kernels.linear_pair(*tensors, rule.competition, rule.tau, totals)

    def update(self, tensors: Tensors, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.ghl_kernels.linear_update(*tensors, *choices(rule))


@dataclasses.dataclass(frozen=True)
class Conv:
    batch: int
    channels: int
    size: tuple[int, int]
    neurons: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def positions(self) -> tuple[int, ...]:
        geometry = zip(
            self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True
        )
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in geometry)

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Random x, y, g, w."""
        x = (self.batch, self.channels, *self.size)
        y = (self.batch, self.neurons, *self.positions)
        w = (self.neurons, self.channels // self.groups, *self.kernel)
        return [torch.randn(shape).to(dtype) for shape in (x, y, y, w)]

    def reference(self, tensors: Tensors, rule: Rule | str) -> reference.Update:
        return reference.conv2d_update(*tensors, rule, *self.geometry)

    def pair(
        self, tensors: Tensors, rule: Rule, totals: str = "sums"
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.ghl_kernels.conv2d_pair(
            *tensors, *self.geometry, rule.competition, rule.tau, totals
        )

    def update(self, tensors: Tensors, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.ghl_kernels.conv2d_update(*tensors, *self.geometry, *choices(rule))


Layer = Linear | Conv


def problem_of(layer: Layer, dtype: torch.dtype) -> Problem:
    """The layer as the dispatcher sees it."""
    x, y, g, w = layer.tensors(dtype)
    if isinstance(layer, Linear):
        return Problem.of_linear(x, w)
    return Problem.of_conv2d(x, y, g, w, *layer.geometry)


def sliced(t: Tensor) -> Tensor:
    """The same values inside a larger tensor of NaN: a storage offset, and gaps between rows."""
    around = t.new_full([n + 2 for n in t.shape], float("nan"))
    inside = around[tuple(slice(1, -1) for _ in t.shape)]
    return inside.copy_(t)


def every_other(t: Tensor) -> Tensor:
    """The same values two elements apart, NaN between them."""
    around = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    return around[..., ::2].copy_(t)


def reversed_order(t: Tensor) -> Tensor:
    """The same values with the first dimension innermost; the transpose of a matrix."""
    backwards = list(range(t.dim()))[::-1]
    return t.permute(backwards).contiguous().permute(backwards)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": sliced,
    "every_other": every_other,
    "reversed": reversed_order,
}
MATRIX_LAYOUTS = {name: f for name, f in LAYOUTS.items() if name != "channels_last"}


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def tolerance(exact: Tensor, natural: Tensor, scale: float) -> float:
    """Twice what PyTorch's operators in the same dtype lose, and a few roundings of the result and
    of the sums it was made from, whose largest magnitude is `scale`."""
    lost = largest(natural.double() - exact)
    of_sums = torch.finfo(torch.promote_types(natural.dtype, torch.float32)).eps
    return 2 * lost + 4 * of_sums * scale + torch.finfo(natural.dtype).eps * largest(exact)


def assert_near(name: str, actual: Tensor, exact: Tensor, natural: Tensor, scale: float) -> None:
    """`actual` is as near to the float64 `exact` as `natural`, PyTorch's own, warrants."""
    assert actual.shape == exact.shape, name
    assert not actual.isnan().any(), f"{name} holds NaN"
    error, allowed = largest(actual.double() - exact), tolerance(exact, natural, scale)
    assert error <= allowed, f"{name} is off by {error:.3g}, PyTorch's own allow {allowed:.3g}"


def wide(tensors: Tensors) -> list[Tensor]:
    return [t.double() for t in tensors]


def magnitudes(layer: Layer, tensors: Tensors, rule: Rule) -> reference.Update:
    """G and H0 as sums of magnitudes: what their rounding errors are relative to."""
    x, y, g, w = (t.double() for t in tensors)
    signals = reference.compete(y, rule).abs(), g.abs()
    return layer.reference((x.abs(), *signals, w), Rule(competition="linear"))


def condition(y: Tensor, rule: Rule) -> float:
    """How much the float64 reference itself multiplies a rounding of y / tau by."""
    return 1 + largest(y) / rule.tau if y.dtype == torch.float64 else 1.0


def assert_pair(
    layer: Layer, tensors: Tensors, rule: Rule | None = None, wanted: str = "sums"
) -> None:
    """G, H0 and the totals that are wanted are those of the reference, in the strides of w."""
    rule = rule or Rule()
    G, H0, totals = layer.pair(tensors, rule, wanted)
    x, y, _, w = tensors
    exact, natural = layer.reference(wide(tensors), rule), layer.reference(tensors, rule)
    scale, conditioned = magnitudes(layer, tensors, rule), condition(y, rule)
    assert_near("G", G, exact.G, natural.G, largest(scale.G))
    assert_near("H0", H0, exact.H0, natural.H0, largest(scale.H0) * conditioned)
    assert G.stride() == H0.stride() == torch.empty_like(w).stride()

    assert G.dtype == H0.dtype == totals.dtype == torch.promote_types(x.dtype, torch.float32)
    u, u_natural = (reference.compete(t, rule).movedim(1, 0).flatten(1) for t in (y.double(), y))
    assert totals[-1] == u.shape[1], "the last of totals is the number of rows"
    if wanted == "rows":
        return
    most = largest(u.abs().sum(1)) * conditioned
    assert_near("totals", totals[:-1], u.sum(1), u_natural.sum(1), most)


def magnitude_of_H(H0: Tensor, u_sum: Tensor, w: Tensor, rule: Rule) -> Tensor:
    """|H0| + |s| |w| with s a sum of magnitudes, from |H0| and |u_sum|."""
    w = w.double().abs()
    if rule.decay == "none":
        return H0
    s = (H0 * w).flatten(1).sum(1) if rule.decay == "oja" else u_sum
    return H0 + s.view(-1, *[1] * (w.dim() - 1)) * w


def divisor(H: Tensor, rows: int, rule: Rule) -> float:
    """What the normalisation divides H by."""
    if rule.gate in ("gradient", "sign_only") or rule.normalize == "none":
        return 1.0
    return max(rows, 1) if rule.normalize == "mean" else largest(H) + 1e-30


def assert_update(
    update: Tensor,
    exact: reference.Update,
    natural: reference.Update,
    scale: float,
    sure: Tensor,
    rule: Rule,
) -> None:
    """The update where the sign of G is `sure`; elsewhere its magnitude, since a sign may flip.

    `scale` is the largest magnitude that cancels in H, over the divisor of the normalisation.
    """
    unit = {"gradient": largest(exact.G), "sign_only": 1.0}.get(rule.gate, scale)
    assert_near("update", update[sure], exact.update[sure], natural.update[sure], unit)
    most = largest(exact.update) + tolerance(exact.update, exact.update.to(update.dtype), unit)
    assert (update[~sure].abs() <= most).all()
