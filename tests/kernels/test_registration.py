"""Ways past the dispatcher are taken where nobody else would see a call, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ghl_kernels import ops, registration

RULE = "softmax", 1.0
linear_pair = torch.ops.ghl_kernels.linear_pair


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


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """'directly' for a call that went past the dispatcher, 'by the operator' for another."""
    found: list[str] = []
    run = ops.linear_pair

    def counted(*arguments: Any) -> Any:
        found.append("directly")
        return run(*arguments)

    def operator(*arguments: Any) -> Any:
        found.append("by the operator")
        return linear_pair.default(*arguments)

    monkeypatch.setitem(ops.direct, "linear_pair", registration.shortcut(operator, counted))
    return found


def test_plain_tensors(runs: list[str]) -> None:
    arguments = tensors()
    expected = linear_pair(*arguments, *RULE)
    given = ops.direct["linear_pair"](*arguments, *RULE)
    assert runs == ["directly"]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_a_mode_sees_the_operator(runs: list[str]) -> None:
    with Watch() as watch:
        ops.direct["linear_pair"](*tensors(), *RULE)
    assert watch.seen == ["linear_pair"]
    assert runs == ["by the operator"]


def test_a_mode_sees_an_operator_that_autograd_lets_through() -> None:
    with Watch() as watch, torch.no_grad():
        linear_pair(*tensors(), *RULE)
    assert watch.seen == ["linear_pair"]


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_data(device: str, runs: list[str]) -> None:
    if device == "meta":
        result = ops.direct["linear_pair"](*(t.to("meta") for t in tensors()), *RULE)
    else:
        with FakeTensorMode():
            result = ops.direct["linear_pair"](*tensors(), *RULE)
    assert runs == ["by the operator"]
    assert result[0].shape == (4, 3)


def test_autocast_casts(runs: list[str]) -> None:
    x, y, g, w = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        G, *_ = ops.direct["linear_pair"](x, y, g, w, *RULE)
    expected, *_ = linear_pair(x.bfloat16(), y.bfloat16(), g.bfloat16(), w, *RULE)
    assert runs == ["by the operator"]
    assert torch.equal(G, expected)


def test_transforms(runs: list[str]) -> None:
    arguments = tensors()

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            return ops.direct["linear_pair"](x, *arguments[1:], *RULE)[0].sum() + 0 * x.sum()

    torch.func.grad(loss)(arguments[0])
    assert runs == ["by the operator"]


@pytest.mark.parametrize("which", range(4))
def test_a_lazily_negated_tensor(which: int, runs: list[str]) -> None:
    """Its memory holds the opposite: the dispatcher resolves it, kernels would not."""
    arguments = [*tensors()]
    wanted = linear_pair(*arguments, *RULE)
    arguments[which] = torch._neg_view(-arguments[which])
    given = ops.direct["linear_pair"](*arguments, *RULE)
    assert runs == ["by the operator"]
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_a_profiler_lists_the_operator(runs: list[str]) -> None:
    with torch.profiler.profile() as profile:
        ops.direct["linear_pair"](*tensors(), *RULE)
    assert runs == ["by the operator"]
    assert "ghl_kernels::linear_pair" in {event.key for event in profile.key_averages()}
