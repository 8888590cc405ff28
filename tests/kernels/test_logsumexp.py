"""The log-sum-exp over the neurons of y / tau, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, LAYOUTS, assert_near, condition, largest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghl_kernels import Rule

INFINITY, NAN = float("inf"), float("nan")


def logsumexp(y: Tensor, tau: float = 1.0, dim: int = 1) -> Tensor:
    return torch.ops.ghl_kernels.logsumexp(y, tau, dim)


def assert_logsumexp(y: Tensor, tau: float = 1.0, dim: int = 1) -> None:
    """Against torch.logsumexp in float64, as near as it is in the dtype of y."""
    lse = logsumexp(y, tau, dim)
    exact, natural = torch.logsumexp(y.double() / tau, dim), torch.logsumexp(y / tau, dim)
    assert lse.dtype == torch.promote_types(y.dtype, torch.float32)
    assert lse.is_contiguous()
    scale = max(1.0, largest(exact), condition(y, Rule(tau=tau)))
    assert_near("lse", lse, exact, natural, scale)


@pytest.mark.usefixtures("implementation")
class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "shape", [(5, 7), (1, 1), (300, 3), (3, 300), (2, 5, 4, 3), (3, 17, 15, 19)], ids=str
    )
    def test_every_dtype_and_dimension(
        self, shape: tuple[int, ...], dtype: torch.dtype, threads: int
    ) -> None:
        y = torch.randn(shape).to(dtype)
        for dim in range(-len(shape), len(shape)):
            assert_logsumexp(y, 0.7, dim)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout(self, layout: str) -> None:
        for dim in range(4):
            assert_logsumexp(LAYOUTS[layout](torch.randn(3, 18, 5, 4)), dim=dim)

    def test_expanded(self) -> None:
        y = torch.randn(3, 18, 5, 4)
        for dimension in range(4):
            assert_logsumexp(y.narrow(dimension, 0, 1).expand(y.shape))
        assert_logsumexp(torch.tensor(2.0).expand(6, 9))

    @settings(max_examples=50)
    @given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=3), data=st.data())
    def test_any_shape(self, shape: list[int], data: st.DataObject) -> None:
        dim = data.draw(st.integers(-len(shape), len(shape) - 1))
        assert_logsumexp(torch.randn(shape), data.draw(st.sampled_from([0.1, 1.0, 30.0])), dim)

    @pytest.mark.parametrize("tau", [1e-6, 1e-3, 0.25, 1e4, 1e30])
    @pytest.mark.parametrize("scale", [1.0, 1e4])
    def test_large_logits_do_not_overflow(self, tau: float, scale: float) -> None:
        for dtype in (torch.float32, torch.float64):
            assert_logsumexp(torch.randn(40, 33, dtype=dtype) * scale, tau)

    @pytest.mark.parametrize("neurons", [3, 16, 35])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_nan_and_infinity(self, layout: str, neurons: int) -> None:
        """As torch.logsumexp has them, wherever in a row they stand."""
        for values in ([NAN], [INFINITY], [-INFINITY], [INFINITY, NAN], [INFINITY, -INFINITY]):
            for first in (0, neurons - 1):
                y = torch.randn(2, neurons, 3, 3)
                for i, value in enumerate(values):
                    y[1, first - i, 1, 1] = value
                wanted = torch.logsumexp(y, 1)
                actual = logsumexp(LAYOUTS[layout](y))
                torch.testing.assert_close(actual, wanted, equal_nan=True)

    def test_y_over_a_tiny_tau_is_infinite(self) -> None:
        lse = logsumexp(torch.tensor([[1.0, -2.0], [-1.0, -3.0]]), 1e-39)
        assert lse.tolist() == [INFINITY, -INFINITY]

    def test_a_row_of_minus_infinity(self) -> None:
        y = torch.randn(3, 5)
        y[1] = -INFINITY
        torch.testing.assert_close(logsumexp(y), torch.logsumexp(y, 1))

    def test_no_rows(self) -> None:
        assert logsumexp(torch.randn(0, 5)).shape == (0,)
        assert logsumexp(torch.randn(2, 5, 0, 3)).shape == (2, 0, 3)

    def test_the_same_bits_for_the_same_threads(self, threads: int) -> None:
        y = torch.randn(5, 33, 17, 16)
        once = logsumexp(y)
        assert all(torch.equal(logsumexp(y), once) for _ in range(5))

    @pytest.mark.parametrize("dim", [0, 1, -1])
    @pytest.mark.parametrize("tau", [0.3, 1.0])
    def test_first_and_second_derivative(self, dim: int, tau: float) -> None:
        y = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
        torch.autograd.gradcheck(lambda y: logsumexp(y, tau, dim), y)
        torch.autograd.gradgradcheck(lambda y: logsumexp(y, tau, dim), y)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_derivative_is_the_softmax(self, dtype: torch.dtype) -> None:
        """In the dtype of y, also when the gradient arrives expanded."""
        y = torch.randn(6, 9).to(dtype).requires_grad_()
        logsumexp(y, 0.5).sum().backward()
        assert y.grad.dtype == dtype
        exact, natural = (
            torch.softmax(t / 0.5, 1) / 0.5 for t in (y.detach().double(), y.detach())
        )
        assert_near("grad", y.grad, exact, natural, 2.0)

    def test_derivative_of_large_logits(self) -> None:
        """y / tau has its digits in float32, not in the dtype of y."""
        y = (20 * torch.randn(6, 9)).to(torch.bfloat16).requires_grad_()
        logsumexp(y, 0.3).sum().backward()
        exact = torch.softmax(y.detach().double() / 0.3, 1) / 0.3
        torch.testing.assert_close(y.grad.double(), exact, rtol=2**-7, atol=1e-6)
