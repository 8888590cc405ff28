"""The one list of operators: schemas, checks, shapes and strides of results, autograd, autocast.

Holds no arithmetic: `dispatch` picks the implementation. The overloads at the end of the list are
what compiled libraries implement; they write into outputs that `native` and `cuda` allocate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ghl_kernels import checks, composed, dispatch
from ghl_kernels.checks import sum_dtype
from ghl_kernels.composed import Triple, Triples
from ghl_kernels.layout import from_rows
from ghl_kernels.problem import TOTALS, Problem
from ghl_kernels.registration import (
    autocast_activations,
    below_autograd,
    on_their_device,
    without_derivative,
)
from ghl_kernels.replay import replayed
from ghl_kernels.rule import CHOICES, check_choice, check_tau, totals_for
from ghl_kernels.tapes import player

Tensors = Sequence[Tensor]
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # stride to groups

ACTIVATIONS = "Tensor x, Tensor y, Tensor g, Tensor w"
GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
COMPETITION = "str competition, float tau"
MERGE = "str decay, str gate, str normalize"
WANTED = "str totals='sums'"  # of TOTALS
USED_AS = "ScalarType? used_as=None"  # the dtype to which w is rounded first

SCHEMAS = (
    "logsumexp(Tensor y, float tau, int dim) -> Tensor",
    f"linear_pair({ACTIVATIONS}, {COMPETITION}, {WANTED}) -> (Tensor, Tensor, Tensor)",
    f"conv2d_pair({ACTIVATIONS}, {GEOMETRY}, {COMPETITION}, {WANTED}) -> (Tensor, Tensor, Tensor)",
    f"merge(Tensor G, Tensor H0, Tensor totals, Tensor w, {MERGE}, {USED_AS}) "
    "-> (Tensor, Tensor, Tensor)",
    f"foreach_merge(Tensor[] G, Tensor[] H0, Tensor[] totals, Tensor[] w, {MERGE}, {USED_AS}) "
    "-> (Tensor[], Tensor[], Tensor[])",
    f"linear_update({ACTIVATIONS}, {COMPETITION}, {MERGE}) -> (Tensor, Tensor, Tensor)",
    f"conv2d_update({ACTIVATIONS}, {GEOMETRY}, {COMPETITION}, {MERGE}) -> (Tensor, Tensor, Tensor)",
    "logsumexp.native(Tensor y, Tensor(a!) lse, float tau) -> ()",
    "pair.native(Tensor x, Tensor y, Tensor g, Tensor(a!) G, Tensor(b!) H0, Tensor(c!) totals, "
    "int[] stride, int[] padding, int[] dilation, int groups, int competition, float tau, "
    "bool channels_last) -> ()",
    "merge.native(Tensor G, Tensor H0, Tensor totals, Tensor w, Tensor(a!) update, "
    "Tensor(b!) neurons, Tensor(c!) layer, int decay, int gate, int normalize) -> ()",
    "foreach_merge.cuda(Tensor[] G, Tensor[] H0, Tensor[] totals, Tensor[] w, "
    "Tensor(a!)[] update, Tensor(b!)[] neurons, Tensor(c!)[] layer, Tensor(d!)[] scratch, "
    "int decay, int gate, int normalize) -> ()",
    "logsumexp.cuda(Tensor y, Tensor(a!) lse, float tau) -> ()",
    "statistics.cuda(Tensor y, Tensor(a!) largest, Tensor(b!) inverse, Tensor(c!)? winner, "
    "int competition, float tau) -> ()",
    "pair.cuda(Tensor x, Tensor y, Tensor g, Tensor? largest, Tensor? inverse, Tensor? winner, "
    "Tensor(a!) G, Tensor(b!) H0, Tensor(c!)? u_sums, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int[] out_size, int groups, int competition, float tau, "
    "bool channels_last, bool tf32, int splits, int rows_per_split, int tile, bool sm90, "
    "Tensor(d!)? exchange) -> ()",
    "sum_splits.cuda(Tensor G_parts, Tensor H0_parts, Tensor? u_parts, Tensor(a!) G, "
    "Tensor(b!) H0, Tensor(c!)? u_sums, int splits) -> ()",
)

# Those that tapes may play are also there for a backward, where gradients are off and no look at
# them is paid for: their results are no part of a graph. Nor does autocast cast for them.
NO_GRAD = {
    name: f"{name}_no_grad" for name in ("linear_pair", "conv2d_pair", "merge", "foreach_merge")
}

_library = torch.library.Library("ghl_kernels", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
    _name, _, _rest = _schema.partition("(")
    if _name in NO_GRAD:
        _library.define(f"{NO_GRAD[_name]}({_rest}")


def check_rule(**choices: object) -> None:
    for argument, value in choices.items():
        if argument == "tau":
            check_tau(value)
        else:
            check_choice(argument, value, CHOICES[argument])


def check_pair_rule(competition: str, tau: float, totals: str) -> None:
    check_rule(competition=competition, tau=tau)
    check_choice("totals", totals, TOTALS)


def logsumexp(y: Tensor, tau: float, dim: int) -> Tensor:
    """log Σ exp(y/tau) over dimension `dim`, which the result lacks, in float32 (float64 of that):
    what the softmax u = exp(y/tau − lse) of a competition needs. Has a derivative."""
    checks.check_logsumexp(y, dim)
    check_rule(tau=tau)
    return dispatch.implementation("logsumexp", y).logsumexp(y, tau, dim)


def problem_of_linear(
    x: Tensor, y: Tensor, g: Tensor, w: Tensor, competition: str, tau: float, totals: str
) -> Problem:
    """What implementations are told of a linear layer, once its arguments are checked."""
    checks.check_linear(x, y, g, w)
    check_pair_rule(competition, tau, totals)
    return Problem.of_linear(x, w, competition, totals)


def problem_of_conv2d(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    geometry: Geometry,
    competition: str,
    tau: float,
    totals: str,
) -> Problem:
    """The same of a convolution."""
    checks.check_conv2d(*tensors, *geometry)
    check_pair_rule(competition, tau, totals)
    return Problem.of_conv2d(*tensors, *geometry, competition, totals)


def linear_pair(
    x: Tensor, y: Tensor, g: Tensor, w: Tensor, competition: str, tau: float, totals: str = "sums"
) -> Triple:
    """G = gᵀx and H0 = uᵀx of a linear layer (arXiv 2601.21367, section 3), u as in
    `reference.compete`.

    x (M, C), y and g (M, K), rows of the layer's input, output and the output's gradient, of one
    dtype; w (K, C). Returns G and H0, of the weight's shape and memory order, and totals (K + 1):
    for "sums" the K sums of u over rows, and M; for "rows" M behind K numbers that mean nothing;
    for "none" an empty tensor. All are float32, or float64 of float64. Raises ValueError or
    TypeError naming the argument.
    """
    problem = problem_of_linear(x, y, g, w, competition, tau, totals)
    return dispatch.implementation("linear_pair", x, problem).pair(problem, x, y, g, w, tau)


def conv2d_pair(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    competition: str,
    tau: float,
    totals: str = "sums",
) -> Triple:
    """`linear_pair` of a convolution: a row is an output position, its input the patch under the
    kernel, and all K channels of a position compete.

    x (N, C, H, W), zero-padded by `padding`, y and g (N, K, Ho, Wo), w (K, C/groups, kh, kw).
    """
    geometry = stride, padding, dilation, groups
    problem = problem_of_conv2d((x, y, g, w), geometry, competition, tau, totals)
    return dispatch.implementation("conv2d_pair", x, problem).pair(problem, x, y, g, w, tau)


def merge(
    G: Tensor,
    H0: Tensor,
    totals: Tensor,
    w: Tensor,
    decay: str,
    gate: str,
    normalize: str,
    used_as: torch.dtype | None = None,
) -> Triple:
    """The update, as `reference.merge` has it, from the sums of a pair or of many, and statistics.

    G like w (K, ...); H0 like w, or rows (K, -1) in the order of its memory; totals (K + 1) as
    pairs make them, of which only `instar` reads the sums of u and `mean` the number of rows; w of
    any float dtype, rounded to `used_as` first. Returns the update, like w and of G's dtype;
    neurons (3, K): ⟨G, H⟩, ‖G‖² and ‖H‖² of each neuron's weights, H before its normalisation;
    layer (3): the same of all.
    """
    checks.check_merge(G, H0, totals, w, used_as)
    check_rule(decay=decay, gate=gate, normalize=normalize)
    implementation = dispatch.implementation("merge", G)
    used = w if used_as is None else w.to(used_as)
    return implementation.merge(G, from_rows(H0, w), totals, used, decay, gate, normalize)


def foreach_merge(
    G: Tensors,
    H0: Tensors,
    totals: Tensors,
    w: Tensors,
    decay: str,
    gate: str,
    normalize: str,
    used_as: torch.dtype | None = None,
) -> Triples:
    """`merge` of many layers under one rule, in a launch or two: lists of its results."""
    checks.check_foreach_merge(G, H0, totals, w, used_as)
    check_rule(decay=decay, gate=gate, normalize=normalize)
    implementation = dispatch.implementation("foreach_merge", G[0])
    H0 = [from_rows(*one) for one in zip(H0, w, strict=True)]
    return implementation.foreach_merge(G, H0, totals, rounded(w, used_as), decay, gate, normalize)


def rounded(weights: Tensors, dtype: torch.dtype | None) -> Tensors:
    """The weights in a dtype, all that are not by one launch."""
    others = [w for w in weights if dtype is not None and w.dtype != dtype]
    if not others:
        return weights
    copies = [torch.empty_like(w, dtype=dtype) for w in others]
    torch._foreach_copy_(copies, others)
    made = iter(copies)
    return [w if w.dtype == dtype else next(made) for w in weights]


def linear_update(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    w: Tensor,
    competition: str,
    tau: float,
    decay: str,
    gate: str,
    normalize: str,
) -> Triple:
    """`linear_pair` and `merge` in one: the update, in the dtype of w, neurons and layer."""
    problem = problem_of_linear(x, y, g, w, competition, tau, totals_for(decay))
    check_rule(decay=decay, gate=gate, normalize=normalize)
    implementation = dispatch.implementation("linear_update", x, problem)
    return implementation.update(problem, x, y, g, w, tau, decay, gate, normalize)


def conv2d_update(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    competition: str,
    tau: float,
    decay: str,
    gate: str,
    normalize: str,
) -> Triple:
    """`conv2d_pair` and `merge` in one: the update, in the dtype of w, neurons and layer."""
    geometry = stride, padding, dilation, groups
    problem = problem_of_conv2d((x, y, g, w), geometry, competition, tau, totals_for(decay))
    check_rule(decay=decay, gate=gate, normalize=normalize)
    implementation = dispatch.implementation("conv2d_update", x, problem)
    return implementation.update(problem, x, y, g, w, tau, decay, gate, normalize)


def fake_logsumexp(y: Tensor, tau: float, dim: int) -> Tensor:
    checks.check_logsumexp(y, dim)
    dim %= y.dim()
    return y.new_empty([*y.shape[:dim], *y.shape[dim + 1 :]], dtype=sum_dtype(y.dtype))


def fake_pair(x: Tensor, y: Tensor, g: Tensor, w: Tensor, *rest: object) -> Triple:
    checks.check_device(x, y=y, g=g, w=w)
    dtype = sum_dtype(x.dtype)
    G, H0 = torch.empty_like(w, dtype=dtype), torch.empty_like(w, dtype=dtype)
    # the last of all arguments, `totals`, or another where the dispatcher left out its default
    return G, H0, w.new_empty(0 if rest[-1] == "none" else w.shape[0] + 1, dtype=dtype)


def fake_merge(G: Tensor, H0: Tensor, totals: Tensor, w: Tensor, *rest: object) -> Triple:
    checks.check_device(G, H0=H0, totals=totals, w=w)
    dtype = sum_dtype(G.dtype)
    update = torch.empty_like(w, dtype=G.dtype)
    return update, w.new_empty((3, w.shape[0]), dtype=dtype), w.new_empty(3, dtype=dtype)


def fake_foreach_merge(
    G: Tensors, H0: Tensors, totals: Tensors, w: Tensors, *rest: object
) -> Triples:
    fakes = [fake_merge(*layer) for layer in zip(G, H0, totals, w, strict=True)]
    update, neurons, layer = ([fake[i] for fake in fakes] for i in range(3))
    return update, neurons, layer


def fake_update(x: Tensor, y: Tensor, g: Tensor, w: Tensor, *rest: object) -> Triple:
    checks.check_device(x, y=y, g=g, w=w)
    dtype = sum_dtype(x.dtype)
    return (
        torch.empty_like(w),
        w.new_empty((3, w.shape[0]), dtype=dtype),
        w.new_empty(3, dtype=dtype),
    )


def logsumexp_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, ctx.tau, ctx.dim = inputs
    ctx.save_for_backward(y, output)


def logsumexp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    y, lse = ctx.saved_tensors
    return composed.logsumexp_backward(grad, y, lse, ctx.tau, ctx.dim), None, None


# The public operators: what runs, and what it returns for tensors without data.
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "logsumexp": (logsumexp, fake_logsumexp),
    "linear_pair": (linear_pair, fake_pair),
    "conv2d_pair": (conv2d_pair, fake_pair),
    "merge": (merge, fake_merge),
    "foreach_merge": (foreach_merge, fake_foreach_merge),
    "linear_update": (linear_update, fake_update),
    "conv2d_update": (conv2d_update, fake_update),
}
_served: list[Any] = []  # registrations, as long as this module
TAKES_ACTIVATIONS = ("linear_pair", "conv2d_pair", "linear_update", "conv2d_update")


def register(name: str, public: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator of that name, without autograd. public: the one that it is for others."""
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ghl_kernels::{name}", fake, lib=_library)
    operator = getattr(torch.ops.ghl_kernels, name).default
    if public in TAKES_ACTIVATIONS:
        for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
            _library.impl(name, autocast_activations(operator, device, name == public), key)
    return operator


def register_operator(
    name: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    recorded = implementation if name == "logsumexp" else replayed(name, implementation)
    run = on_their_device(recorded)
    operator = register(name, name, run, fake)
    if name == "logsumexp":
        torch.library.register_autograd(
            f"ghl_kernels::{name}",
            logsumexp_backward, setup_context=logsumexp_context, lib=_library,
        )  # fmt: skip
    else:
        _library.impl(name, without_derivative(operator, run), "Autograd", with_keyset=True)
    if name in NO_GRAD:
        register(NO_GRAD[name], name, below_autograd(run), fake)
        _library.impl(NO_GRAD[name], torch.library.fallthrough_kernel, "Autograd")
        _served.append(player.serve(NO_GRAD[name], name, "CUDA", name in TAKES_ACTIVATIONS))


for _name, (_implementation, _fake) in OPERATORS.items():
    register_operator(_name, _implementation, _fake)
