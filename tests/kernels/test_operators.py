"""The operators as PyTorch sees them: schemas, fakes, autograd, autocast and torch.compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import LAYOUTS, Conv, Linear
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ghl_kernels
from ghl_kernels import Rule, ops

CONV = Conv(2, 4, (6, 5), 6, kernel=(3, 2), stride=(1, 2), padding=(1, 0), groups=2)
LINEAR = Linear(7, 5, 4)
MERGE = ("oja", "sign", "absmax")
OPERATORS = {
    name: getattr(torch.ops.ghl_kernels, name).default
    for name in (*ops.OPERATORS, *ops.NO_GRAD.values())
}
operators = pytest.mark.parametrize("name", OPERATORS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def arguments(name: str, layout: str = "contiguous") -> tuple:
    """What one call of the operator is given, its tensors in that layout where they can be."""

    def order(t: Tensor) -> Tensor:
        return t if layout == "channels_last" and t.dim() != 4 else LAYOUTS[layout](t)

    linear, conv = ([order(t) for t in layer.tensors()] for layer in (LINEAR, CONV))
    G, H0, w = (order(torch.randn(6, 2, 3, 2)) for _ in range(3))
    return {
        "logsumexp": (conv[1], 0.5, 1),
        "linear_pair": (*linear, "softmax", 0.5),
        "conv2d_pair": (*conv, *CONV.geometry, "softmax", 0.5),
        "merge": (G, H0, torch.rand(7), w, *MERGE),
        "foreach_merge": ([G, H0], [H0, G], [torch.rand(7), torch.rand(7)], [w, w * 2], *MERGE),
        "linear_update": (*linear, "softmax", 0.5, *MERGE),
        "conv2d_update": (*conv, *CONV.geometry, "softmax", 0.5, *MERGE),
    }[name.removesuffix("_no_grad")]


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors of arguments or of a result, those in lists included."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def with_tensors(args: tuple, change: Callable[[Tensor], Tensor]) -> tuple:
    return tree_map_only(Tensor, change, args)


@operators
def test_schema_is_functional(name: str) -> None:
    """No operator writes into its arguments or returns one of them."""
    schema = OPERATORS[name]._schema
    assert not schema.is_mutable
    assert all(a.alias_info is None for a in (*schema.arguments, *schema.returns))


@operators
@layouts
def test_opcheck(name: str, layout: str, implementation: str) -> None:
    torch.library.opcheck(OPERATORS[name], arguments(name, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck_of_the_derivative(layout: str, implementation: str) -> None:
    y, tau, dim = arguments("logsumexp", layout)
    torch.library.opcheck(OPERATORS["logsumexp"], (y.requires_grad_(), tau, dim))


@operators
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fake_has_the_real_shape_strides_and_dtype(
    name: str, layout: str, dtype: torch.dtype, implementation: str
) -> None:
    args = with_tensors(
        arguments(name, layout),
        lambda t: torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t),
    )
    real = tensors_of(OPERATORS[name](*args))
    with FakeTensorMode() as mode:
        fake = tensors_of(OPERATORS[name](*with_tensors(args, mode.from_tensor)))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("name", [n for n in ops.OPERATORS if n != "logsumexp"])
def test_no_derivative_is_an_error_not_a_zero(name: str, implementation: str) -> None:
    args = with_tensors(arguments(name), lambda t: t.requires_grad_())
    result = tensors_of(OPERATORS[name](*args))[0]
    with pytest.raises(RuntimeError, match=f"{name} has no derivative; call it under .*no_grad"):
        result.sum().backward()
    with torch.no_grad():
        assert not any(t.requires_grad for t in tensors_of(OPERATORS[name](*args)))


def test_an_update_inside_a_backward_pass(implementation: str) -> None:
    """What a layer does: call the operator from autograd.Function.backward, return it as grad."""

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
            y = x @ w.T
            ctx.save_for_backward(x, y, w)
            return y

        @staticmethod
        def backward(ctx, g: Tensor) -> tuple[None, Tensor]:
            x, y, w = ctx.saved_tensors
            return None, LINEAR.update((x, y, g, w), Rule())[0]

    x, _, _, w = LINEAR.tensors()
    Layer.apply(x, w.requires_grad_()).sum().backward()
    expected = LINEAR.update((x, x @ w.T, torch.ones(7, 4), w.detach()), Rule())[0]
    torch.testing.assert_close(w.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=["linear", "conv"])
def test_autocast_rounds_activations_and_keeps_weight_sums_and_updates(
    layer: Linear | Conv, dtype: torch.dtype, implementation: str
) -> None:
    x, y, g, w = layer.tensors()
    for call in (layer.pair, layer.update):
        with torch.autocast("cpu", dtype=dtype):
            actual = call((x, y, g, w), Rule())
            mixed = call((x, y.to(dtype), g.to(torch.bfloat16), w), Rule())
        wanted = call((x.to(dtype), y.to(dtype), g.to(dtype), w), Rule())
        for a, b in zip(actual, wanted, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
        assert mixed[0].dtype == torch.float32
        assert not torch.equal(actual[0], call((x, y, g, w), Rule())[0])


def test_autocast_leaves_float64_and_merges_alone(implementation: str) -> None:
    wide = LINEAR.tensors(torch.float64)
    merge = arguments("merge")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, merged = LINEAR.update(wide, Rule())[0], OPERATORS["merge"](*merge)[0]
    assert torch.equal(actual, LINEAR.update(wide, Rule())[0])
    assert torch.equal(merged, OPERATORS["merge"](*merge)[0])


@operators
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
def test_compiles_without_a_graph_break(name: str, layout: str, implementation: str) -> None:
    """Between other operations, so that the fake's strides matter to what follows."""
    args = arguments(name, layout)

    def surrounded(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        results = OPERATORS[name](*with_tensors(args, lambda t: next(given) * 2))
        return tuple(r.reshape(-1) + 1 for r in tensors_of(results))

    tensors = tensors_of(args)
    torch._dynamo.reset()
    compiled = torch.compile(surrounded, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(compiled(*tensors), surrounded(*tensors), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_inductor_compiles_all_operators_in_one_graph(implementation: str) -> None:
    tensors = LINEAR.tensors()

    def step(x: Tensor, y: Tensor, g: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        lse = torch.ops.ghl_kernels.logsumexp(y * 2, 1.0, 1)
        sums = LINEAR.pair((x, y, g.relu(), w), Rule())
        merged = torch.ops.ghl_kernels.merge(*sums, w, *MERGE)[0]
        return lse + 1, merged - LINEAR.update((x, y, g, w), Rule())[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for actual, wanted in zip(compiled(*tensors), step(*tensors), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_one_compilation_serves_every_batch_size(implementation: str) -> None:
    """With a dynamic batch; none of the checks turns a symbolic size into a constant."""
    counter, rule = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), Rule()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y, g, w: LINEAR.update((x, y, g, w), rule)[0],
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    compilations = set()
    for rows in (7, 12, 300):
        tensors = dataclasses.replace(LINEAR, rows=rows).tensors()
        torch.testing.assert_close(compiled(*tensors), LINEAR.update(tensors, rule)[0])
        compilations.add(counter.frame_count)
    assert len(compilations) == 1, "a new batch size was compiled anew"


def test_a_compiled_function_asks_the_dispatcher_each_time(implementation: str) -> None:
    tensors = LINEAR.tensors()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: LINEAR.pair(t, Rule())[0], fullgraph=True, backend="aot_eager"
    )
    compiled(*tensors)
    with ghl_kernels.force("composed"):
        compiled(*tensors)
        assert ghl_kernels.last("linear_pair").name == "composed"
    compiled(*tensors)
    assert ghl_kernels.last("linear_pair").name == implementation
