"""The log-sum-exp over neurons by its Triton kernel: any length, dimension, layout and number."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logsumexp import assert_logsumexp, logsumexp
from test_pair_by_triton import DTYPES

from ghl_kernels.triton import logsumexp as kernels

INFINITY, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.usefixtures("fused")


@pytest.fixture(params=[8, 4096], ids=["walked", "in_one_block"])
def longest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The longest row that is one block; longer rows are walked."""
    monkeypatch.setattr(kernels, "LONGEST_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (300, 3), (3, 30), (2, 5, 4, 3)], ids=str)
def test_every_dtype_and_dimension(
    shape: tuple[int, ...], dtype: torch.dtype, longest: int
) -> None:
    y = torch.randn(shape).to(dtype)
    for dim in range(-1, len(shape)):
        assert_logsumexp(y, 0.7, dim)


@pytest.mark.parametrize("neurons", [4095, 4096, 4097, 9001])
def test_rows_longer_than_the_longest_block(neurons: int) -> None:
    assert_logsumexp(torch.randn(3, neurons))
    assert_logsumexp(torch.randn(2, neurons, 2).movedim(1, 0), dim=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, longest: int) -> None:
    for dim in range(4):
        assert_logsumexp(LAYOUTS[layout](torch.randn(3, 18, 5, 4)), dim=dim)


def test_expanded() -> None:
    y = torch.randn(3, 18, 5, 4)
    for dimension in range(4):
        assert_logsumexp(y.narrow(dimension, 0, 1).expand(y.shape))
    assert_logsumexp(torch.tensor(2.0).expand(6, 9))


@settings(max_examples=25)
@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=3), data=st.data())
def test_any_shape(shape: list[int], data: st.DataObject, longest: int) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    assert_logsumexp(torch.randn(shape), data.draw(st.sampled_from([0.1, 1.0, 30.0])), dim)


@pytest.mark.parametrize("tau", [1e-6, 1e-3, 0.25, 1e4, 1e30])
def test_large_logits_do_not_overflow(tau: float, longest: int) -> None:
    for scale in (1.0, 1e4):
        assert_logsumexp(torch.randn(40, 33) * scale, tau)


@pytest.mark.parametrize("neurons", [3, 16, 35])
def test_nan_and_infinity(neurons: int, longest: int) -> None:
    """As torch.logsumexp has them, wherever in a row they stand, and rows of nothing else."""
    rows = [torch.full((neurons,), value) for value in (NAN, INFINITY, -INFINITY)]
    for values in ([NAN], [INFINITY], [-INFINITY], [INFINITY, NAN], [-INFINITY, INFINITY]):
        for first in (0, neurons // 2, neurons - 1):
            row = torch.randn(neurons)
            for i, value in enumerate(values):
                row[first - i] = value
            rows.append(row)
    almost = torch.full((neurons,), -INFINITY)
    almost[-1] = 2.0  # every block before the last holds nothing finite
    y = torch.stack([*rows, almost, torch.randn(neurons)])
    torch.testing.assert_close(logsumexp(y), torch.logsumexp(y, 1), equal_nan=True)
    torch.testing.assert_close(logsumexp(y.T, dim=0), torch.logsumexp(y, 1), equal_nan=True)


def test_no_rows() -> None:
    assert logsumexp(torch.randn(0, 5)).shape == (0,)
    assert logsumexp(torch.randn(2, 5, 0, 3)).shape == (2, 0, 3)


def test_derivative_is_the_softmax() -> None:
    y = torch.randn(6, 9, requires_grad=True)
    logsumexp(y, 0.5).sum().backward()
    torch.testing.assert_close(y.grad, torch.softmax(y.detach() / 0.5, 1) / 0.5)
