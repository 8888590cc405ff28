"""Operators for callers with gradients off are seen by all but autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

RULE = "softmax", 1.0
linear_pair = torch.ops.ghl_kernels.linear_pair
linear_pair_no_grad = torch.ops.ghl_kernels.linear_pair_no_grad


class Watch(TorchDispatchMode):
    """Writes down the operators of ours that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ghl_kernels" and func._overloadname == "default":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def tensors() -> tuple[Tensor, ...]:
    return torch.randn(5, 3), torch.randn(5, 4), torch.randn(5, 4), torch.randn(4, 3)


def test_they_do_what_the_operator_does() -> None:
    arguments = tensors()
    expected, given = linear_pair(*arguments, *RULE), linear_pair_no_grad(*arguments, *RULE)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_results_are_no_part_of_a_graph(implementation: str) -> None:
    x, *rest = tensors()
    assert linear_pair(x.requires_grad_(), *rest, *RULE)[0].requires_grad
    assert not linear_pair_no_grad(x.requires_grad_(), *rest, *RULE)[0].requires_grad


@pytest.mark.parametrize("operator", [linear_pair, linear_pair_no_grad], ids=lambda o: o.__name__)
def test_a_mode_sees_the_operator(operator: Any) -> None:
    with Watch() as watch, torch.no_grad():
        operator(*tensors(), *RULE)
    assert watch.seen == [operator.__name__]


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_data(device: str) -> None:
    if device == "meta":
        result = linear_pair_no_grad(*(t.to("meta") for t in tensors()), *RULE)
    else:
        with FakeTensorMode():
            result = linear_pair_no_grad(*tensors(), *RULE)
    assert result[0].shape == (4, 3)


def test_autocast_casts_for_the_others_alone() -> None:
    x, y, g, w = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, *_ = linear_pair(x, y, g, w, *RULE)
        exact, *_ = linear_pair_no_grad(x, y, g, w, *RULE)
    for given, dtype in ((rounded, torch.bfloat16), (exact, torch.float32)):
        expected, *_ = linear_pair(x.to(dtype), y.to(dtype), g.to(dtype), w, *RULE)
        assert torch.equal(given, expected)


def test_transforms() -> None:
    arguments = tensors()

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            G, *_ = linear_pair_no_grad(x, *arguments[1:], *RULE)
        return G.sum() * x.sum()

    found = torch.func.grad(loss)(arguments[0])
    assert torch.allclose(found, linear_pair(*arguments, *RULE)[0].sum().expand(5, 3))


@pytest.mark.parametrize("which", range(4))
def test_a_lazily_negated_tensor(which: int) -> None:
    """Its memory holds the opposite: the dispatcher resolves it, kernels would not."""
    arguments = [*tensors()]
    wanted = linear_pair(*arguments, *RULE)
    arguments[which] = torch._neg_view(-arguments[which])
    given = linear_pair_no_grad(*arguments, *RULE)
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_a_profiler_lists_the_operator() -> None:
    with torch.profiler.profile() as profile:
        linear_pair_no_grad(*tensors(), *RULE)
    assert "ghl_kernels::linear_pair_no_grad" in {event.key for event in profile.key_averages()}
