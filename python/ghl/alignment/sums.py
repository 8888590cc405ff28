"""What one weight gathers in one measured step: sums that are linear in the data, and its uses.

Uses may be several in a forward, in several forwards and on several ranks: everything here adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghl.alignment import samples
from ghl_kernels import Rule
from ghl_kernels.checks import sum_dtype
from ghl_kernels.composed import compete, hebbian, totals

ALL = slice(None)
OVERWRITTEN = "its input was overwritten in place after its forward"
LET_GO = "a second backward (retain_graph=True) asks for activations that the first has let go"


@dataclass(frozen=True)
class Geometry:
    """A convolution as the operators take it; its x is padded beforehand where zeros do not do."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def version(t: Tensor) -> int | None:
    """How often a tensor was changed in place; nobody counts that of one of inference_mode."""
    return None if t.is_inference() else t._version


class Use:
    """One use of a weight in a forward: x and y, kept until the gradient of y arrives.

    neurons: the weight's rows that it uses. again: computes y anew, should it be overwritten in
    place by then; an x that was overwritten is a gap. generation: that of the sums in which it has
    been added, None if in none.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        again: Callable[[Tensor], Tensor],
        geometry: Geometry | None = None,
        neurons: slice = ALL,
    ) -> None:
        self.x: Tensor | None = x.detach()
        self.y: Tensor | None = y.detach()
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        # the Parameters, of which attention uses slices
        self.leaf: Tensor = weight if weight._base is None else weight._base
        self.bias_leaf = bias if bias is None or bias._base is None else bias._base
        self.versions = version(x), version(y)
        self.again, self.geometry, self.neurons = again, geometry, neurons
        self.generation: int | None = None

    def activations(self) -> tuple[Tensor, Tensor] | str:
        """x and y as batches in the dtype of y, or why there are none any more."""
        x, y = self.x, self.y
        if x is None or y is None:
            return LET_GO
        if version(x) != self.versions[0]:
            return OVERWRITTEN
        if version(y) != self.versions[1]:
            with torch.autocast(y.device.type, enabled=False):  # whatever backward is called in
                y = self.again(x.to(y.dtype)).detach()
        return self.as_batch(x.to(y.dtype)), self.as_batch(y)

    def let_go(self) -> None:
        """Keep no activations: the graph, with a hook that has this use, may outlive a step."""
        self.x = self.y = None

    def as_batch(self, t: Tensor) -> Tensor:
        """(rows, features) for a linear layer, (N, C, H, W) for a convolution."""
        if self.geometry is None:
            return t.reshape(t.shape[:-1].numel(), t.shape[-1])
        return t if t.dim() == 4 else t[None]

    def weight_gradient(self, x: Tensor, signal: Tensor) -> Tensor:
        """Σ signal xᵀ over rows, of the shape of the weight's rows that it uses."""
        if self.geometry is None:
            return signal.T @ x
        place = self.geometry
        shape = self.weight  # of it nothing else is read
        if shape.dtype != x.dtype:
            shape = torch.empty_like(shape, dtype=x.dtype)
        return torch.ops.aten.convolution_backward(
            signal, x, shape, None, place.stride, place.padding, place.dilation,
            False, [0, 0], place.groups, [False, True, False],
        )[1]  # fmt: skip


class Sums:
    """G (K, ...), H0 (K, ...), Σu (K), and sums of samples.

    signal: whether G is gathered or given; a layer with a rule of ours has it in weight.grad.
    problem: why none of it may be reported, to the end of the step; fault: the same, until its
    gradients are dropped; sample_problem: why not the sample statistic. generation: how often
    gradients were.
    """

    def __init__(
        self, weight: nn.Parameter, rule: Rule, batch: bool, sample: bool, signal: bool
    ) -> None:
        self.rule, self.batch, self.sample, self.signal = rule, batch, sample, signal
        self.shape, self.device, self.dtype = weight.shape, weight.device, sum_dtype(weight.dtype)
        self.compute_dtype = weight.dtype
        self.problem: str | None = None
        self.generation = 0
        self.reset()

    def reset(self, uses: int = 0) -> None:
        """Nothing yet, and the gradients of so many uses still to come."""
        self.generation += 1
        self.fault: str | None = None
        self.sample_problem: str | None = None
        self.elsewhere: Tensor | None = None  # number of ranks with a problem
        self.zeroed: Tensor | None = None  # whether earlier gradients were set to zero, not None
        self.uses, self.answered = uses, 0
        self.arrived: set[int] = set()  # backwards that came through a use
        self.accumulated: set[int] = set()  # and those that reached weight.grad
        self.rows: float | Tensor = 0.0  # a Tensor once it is of all ranks
        self.scale = 1.0  # of the signal, which is not multiplied by it
        self.G: Tensor | None = None
        self.H0: Tensor | None = None
        self.u_sum: Tensor | None = None  # only a decay asks for it: instar
        self.neurons: Tensor | None = None  # (K, 3), of samples.measure
        self.layer: Tensor | None = None  # (3)

    @torch.no_grad()
    def add(self, use: Use, g: Tensor | None, G: Tensor | None = None) -> None:
        """Add a use whose ∂ℓ/∂y is g, with its part in ∂ℓ/∂W where backward has computed that.

        g None: of a use whose signal is given. A second backward adds to the signal alone.
        """
        if use.generation == self.generation:
            self._add_again(use, g, G)
            return
        found = use.activations()
        if isinstance(found, str):
            self.fault = found
            return
        use.generation = self.generation
        self.answered += 1
        x, y = found
        self.compute_dtype = y.dtype
        with torch.autocast(y.device.type, enabled=False):
            h = y
            if use.bias is not None:
                h = y - use.bias.to(y.dtype).view(1, -1, *[1] * (y.dim() - 2))
            linear = self.rule.competition == "linear"
            share = use.weight.shape[0] / self.shape[0]
            self.rows += share * (y.shape[0] * y.shape[2:].numel())
            u = h if linear else compete(y, self.rule.competition, self.rule.tau)
            if g is not None:
                g = use.as_batch(g.detach().to(y.dtype))
            if self.batch:
                self._add_batch(use, x, u, g, G)
            if self.sample and g is not None:
                self._add_samples(use, x, u, h, g)
        if G is not None or not self.signal:
            use.let_go()

    def _add_again(self, use: Use, g: Tensor | None, G: Tensor | None) -> None:
        self.sample_problem = "cosines of a signal that came in several backwards do not add"
        if not (self.batch and self.signal):
            return
        if G is None:
            found = use.activations()
            if isinstance(found, str):
                self.fault = found
                return
            assert g is not None
            x, y = found
            with torch.autocast(y.device.type, enabled=False):
                G = use.weight_gradient(x, use.as_batch(g.detach().to(y.dtype)))
        self._accumulate("G", G.detach().to(self.dtype, copy=True), use.neurons)

    def note_zeroed(self, gradient: Tensor) -> None:
        """Look, without waiting, whether what earlier backwards have left is still there."""
        left = self.G if self.G is not None else self.neurons
        zero = (gradient.detach() == 0).all()
        if left is not None:
            zero = zero & (left != 0).any()
        self.zeroed = zero if self.zeroed is None else self.zeroed | zero

    def _add_batch(
        self, use: Use, x: Tensor, u: Tensor, g: Tensor | None, G: Tensor | None
    ) -> None:
        if self.signal and g is not None:
            if G is None:
                G = use.weight_gradient(x, g).to(self.dtype)
            else:  # its memory becomes that of weight.grad, which others change in place
                G = G.detach().to(self.dtype, copy=True)
            self._accumulate("G", G, use.neurons)
        H0 = hebbian(lambda signal: use.weight_gradient(x, signal), u, x)
        self._accumulate("H0", H0.to(self.dtype), use.neurons)
        if self.rule.decay == "instar":
            u_sum = totals(u, 0, True)[:-1]
            self._accumulate("u_sum", u_sum.to(self.dtype), use.neurons)

    def _add_samples(self, use: Use, x: Tensor, u: Tensor, h: Tensor, g: Tensor) -> None:
        place = use.geometry
        groups = 1 if place is None else place.groups
        x, u, h, g, w = (t.to(self.dtype) for t in (x, u, h, g, use.weight))
        if place is None:
            x2 = x.square().sum(1).view(-1, 1, 1, 1)
        else:
            x2 = samples.patch_norms(
                x, tuple(w.shape[2:]), place.stride, place.padding, place.dilation, groups
            ).unsqueeze(2)
        w2 = w.flatten(1).square().sum(1).view(groups, -1, 1)
        h, u, g = (t.unflatten(1, (groups, -1)).unsqueeze(-1).flatten(3) for t in (h, u, g))
        neurons, layer = samples.measure(x2, w2, h, u, g, self.rule.decay)
        self._accumulate("neurons", neurons, use.neurons)
        self.layer = layer if self.layer is None else self.layer + layer

    def _accumulate(self, field: str, value: Tensor, neurons: slice) -> None:
        held: Tensor | None = getattr(self, field)
        if held is None and neurons == ALL:
            setattr(self, field, value)
            return
        if held is None:
            held = value.new_zeros((self.shape[0], *value.shape[1:]))
            setattr(self, field, held)
        held[neurons].add_(value)  # += would copy the sum onto itself

    def fill_in(self) -> list[str]:
        """Zeros where this rank has nothing; the names of the fields that all ranks add up."""
        self.elsewhere = self._full((), float(self.problem is not None))
        if not isinstance(self.rows, Tensor):
            self.rows = self._full((), self.rows)
        neurons = self.shape[0]
        shapes: dict[str, tuple[int, ...]] = {}
        if self.batch:
            shapes["H0"] = self.shape
            shapes |= {"G": self.shape} if self.signal else {}
            shapes |= {"u_sum": (neurons,)} if self.rule.decay == "instar" else {}
        if self.sample:
            shapes |= {"neurons": (neurons, 3), "layer": (3,)}
        for name, shape in shapes.items():
            if getattr(self, name) is None:
                setattr(self, name, self._full(shape, 0.0))
        return ["elsewhere", "rows", *shapes]

    def _full(self, shape: tuple[int, ...], value: float) -> Tensor:
        return torch.full(shape, value, dtype=self.dtype, device=self.device)
