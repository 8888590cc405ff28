"""Division by multiplication and shift, with which a kernel turns rows into image positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ghl_kernels.triton.conv_wgrad import divide, division_by

LARGEST = 2**31 - 1
numbers = st.one_of(st.integers(0, LARGEST), st.integers(0, 1000), st.integers(2**30, LARGEST))
divisors = st.one_of(st.integers(1, LARGEST), st.integers(1, 300))


def emulated(n: int, multiplier: int, shift: int) -> int:
    """`divide` in integers of any size, asserting that 32 bits hold what the kernel keeps in 32."""
    assert -(2**31) <= multiplier < 2**31
    multiplier %= 2**32  # what the kernel makes of its bits
    assert 0 <= shift < 32
    high = (n * multiplier) >> 32
    assert high + n < 2**32
    return (high + n) >> shift


@settings(max_examples=500)
@given(n=numbers, divisor=divisors)
@example(n=LARGEST, divisor=LARGEST)
@example(n=LARGEST - 1, divisor=LARGEST)
@example(n=LARGEST, divisor=1)
@example(n=LARGEST, divisor=2**30 + 1)
@example(n=0, divisor=1)
def test_the_formula_is_exact(n: int, divisor: int) -> None:
    """At the number, and on both sides of the multiple of the divisor nearest to it."""
    step = n // divisor * divisor
    for m in (n, step, max(step - 1, 0), min(step + divisor, LARGEST)):
        assert emulated(m, *division_by(divisor)) == m // divisor


@triton.jit
def divide_kernel(n, quotient, count, multiplier, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    numbers = tl.load(n + at, inside, other=0)
    tl.store(quotient + at, divide(numbers, multiplier, shift), inside)


@settings(max_examples=10)
@given(divisor=divisors)
@example(divisor=1)
@example(divisor=56 * 56)
@example(divisor=LARGEST)
def test_the_kernel_divides_as_integers_do(divisor: int) -> None:
    multiples = torch.randint(0, LARGEST // divisor + 1, (100,)) * divisor
    n = torch.cat(
        [
            torch.randint(0, LARGEST, (100,)),
            multiples,
            (multiples - 1).clamp(min=0),
            torch.tensor([0, 1, LARGEST - 1, LARGEST]),
        ]
    )
    quotient = torch.full_like(n, -1, dtype=torch.int32)
    grid = (triton.cdiv(n.numel(), 128),)
    divide_kernel[grid](n.int(), quotient, n.numel(), *division_by(divisor), 128)
    assert torch.equal(quotient.long(), n // divisor)
