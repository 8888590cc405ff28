"""Times the update of each case by each implementation, after checking that it is right.

`make bench` runs this and has `bench.report` turn pytest-benchmark's file into a committed result.
"""

from __future__ import annotations

import timeit
from typing import Any

import pytest
import torch

from bench.cases import CASES, IMPLEMENTATIONS, tensors, update
from bench.memory import in_fresh_process
from ghl_kernels import Rule, reference

ROUNDS = 9


def assert_is_the_update(update: torch.Tensor, expected: reference.Update) -> None:
    """The values where rounding cannot have decided sign(G), which may even be 0; else |H|."""
    certain = expected.G.abs() > 1e-4 * expected.G.abs().amax()
    assert certain.double().mean() > 0.99
    exact = expected.update
    torch.testing.assert_close(update.double()[certain], exact[certain], rtol=2e-3, atol=2e-5)
    assert (update.abs()[~certain] <= exact.abs()[~certain] * 1.002 + 2e-5).all()


@pytest.fixture(scope="module")
def matmul_rate() -> float:
    """FLOP/s of the library's float32 matrix product here and now: no update can be faster."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / min(timeit.repeat(lambda: a @ b, number=1, repeat=ROUNDS))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    layer = CASES[request.param]
    inputs = tensors(layer)
    exact, rule = (t.double() for t in inputs), Rule(tau=layer.tau)
    if layer.linear:
        expected = reference.linear_update(*exact, rule)
    else:
        expected = reference.conv2d_update(*exact, rule, padding=layer.padding)
    return request.param, inputs, expected


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_update(benchmark: Any, case: Any, name: str, matmul_rate: float) -> None:
    case_name, inputs, expected = case
    layer = CASES[case_name]
    once = update(layer, name, inputs)
    assert_is_the_update(once().view_as(expected.update), expected)
    benchmark.group = case_name
    benchmark.extra_info.update(
        case=case_name,
        implementation=name,
        flops=layer.flops,
        bytes=layer.bytes(torch.float32.itemsize),
        floor_ms=layer.flops / matmul_rate * 1e3,
        peak_transient_bytes=in_fresh_process(case_name, name),
    )
    benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=1)
