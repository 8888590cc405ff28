"""The operators as PyTorch sees them, each implementation by Triton forced."""

from __future__ import annotations

import pytest
import small_tiles as forms
import torch
from cases import Linear
from test_operators import OPERATORS, arguments, tensors_of, with_tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from ghl_kernels import Rule

operators = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture(autouse=True)
def one_tile(use) -> None:
    use(forms.WHOLE_ROWS)


@operators
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_opcheck(name: str, layout: str, fused: None) -> None:
    torch.library.opcheck(OPERATORS[name], arguments(name, layout))


@pytest.mark.parametrize("name", ["linear_pair", "conv2d_pair", "linear_update", "conv2d_update"])
def test_opcheck_of_every_implementation(name: str, implementation: str) -> None:
    torch.library.opcheck(OPERATORS[name], arguments(name, "channels_last"))


@operators
@pytest.mark.parametrize("layout", ["channels_last", "reversed"])
def test_fake_has_the_real_shape_strides_and_dtype(
    name: str, layout: str, implementation: str
) -> None:
    args = with_tensors(arguments(name, layout), torch.Tensor.half)
    real = tensors_of(OPERATORS[name](*args))
    with FakeTensorMode() as mode:
        fake = tensors_of(OPERATORS[name](*with_tensors(args, mode.from_tensor)))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_compiles_into_one_graph(fused: None) -> None:
    """Between other operations, with a batch of any size."""
    layer, rule = Linear(7, 5, 4), Rule()

    def step(x, y, g, w):
        lse = torch.ops.ghl_kernels.logsumexp(y * 2, 1.0, 1)
        sums = layer.pair((x, y, g.relu(), w), rule)
        return lse.sum() + torch.ops.ghl_kernels.merge(*sums, w, "oja", "sign", "absmax")[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (7, 12):
        tensors = Linear(rows, 5, 4).tensors()
        torch.testing.assert_close(compiled(*tensors), step(*tensors))


@pytest.mark.parametrize("name", ["linear_pair", "merge"])
def test_float64_is_an_error_when_forced_and_not_a_lesser_precision(name: str, forced) -> None:
    args = with_tensors(arguments(name), torch.Tensor.double)
    with forced("triton"):
        OPERATORS[name](*arguments(name))
        with pytest.raises(RuntimeError, match=f"triton is forced for {name}, but .* no float64"):
            OPERATORS[name](*args)
