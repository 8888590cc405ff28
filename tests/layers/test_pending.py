"""Merges wait for the end of a backward: how many there are, and what may happen until then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ghl
from ghl import pending
from ghl_kernels import ops

RULES = ("ghl", ghl.Rule("softmax", 0.5, "instar", "hebb", "mean"))


def network(*rules: ghl.Rule | str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [ghl.Linear(6, 6, rule=rule) for rule in rules]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.Tanh())])


def backward(model: nn.Module) -> list[Tensor]:
    """The updates of a backward whose input is always the same."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    return [layer.weight.grad for layer in model if isinstance(layer, ghl.Linear)]


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each merge was of."""
    found: list[int] = []
    merge = ops.direct["foreach_merge"]

    def counted(G: list[Tensor], *rest: Any) -> Any:
        found.append(len(G))
        return merge(G, *rest)

    monkeypatch.setitem(ops.direct, "foreach_merge", counted)
    return found


def test_one_merge_for_all_weights_of_a_rule(merges: list[int]) -> None:
    backward(network("ghl", "ghl", RULES[1], "ghl"))
    assert sorted(merges) == [1, 3]


def test_rules_that_differ_before_the_merge_share_it(merges: list[int]) -> None:
    backward(network("ghl", ghl.Rule("hard", 1.0), ghl.Rule(tau=3.0)))
    assert merges == [3]


@pytest.mark.parametrize("most", [1, 2 * 4 * 36])
def test_much_memory_is_merged_at_once(
    most: int, merges: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(*["ghl"] * 5)
    expected = [u.clone() for u in backward(model)]
    model.zero_grad()
    merges.clear()
    monkeypatch.setattr(pending, "MOST_BYTES", most)
    given = backward(model)
    assert merges == ([1] * 5 if most == 1 else [2, 2, 1])
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


class Raises(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise ValueError("on its way back")


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_a_backward_that_raised_are_not_added_to(rule: Any) -> None:
    """What it left is G, without the sums that would make an update of it."""
    model = network(rule, rule)
    expected = [u.clone() for u in backward(model)]
    model.zero_grad()
    fails = nn.Sequential(model[0], *model[1:])
    x = torch.randn(5, 6)
    with pytest.raises(ValueError, match="on its way back"):
        fails[1:](Raises.apply(fails[0](x))).sum().backward()
    assert model[2].weight.grad is not None
    with pytest.raises(RuntimeError, match=r"a backward that raised .*zero_grad"):
        backward(model)
    model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(backward(model), expected, strict=True))


def test_a_backward_that_raised_leaves_nothing_behind() -> None:
    model = network("ghl", "ghl")
    with pytest.raises(ValueError, match="on its way back"):
        model[1:](Raises.apply(model[0](torch.randn(5, 6)))).sum().backward()
    assert not pending._of_task


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_that_was_taken_away_does_not_come_back(rule: Any) -> None:
    """As an optimizer inside of backward does with other weights' too."""
    model = network(rule, rule)

    def take(gradient: Tensor) -> None:
        model[2].weight.grad = None

    model[0].bias.register_hook(take)
    first, second = backward(model)
    assert first is not None
    assert second is None


def test_a_gradient_is_an_update_for_whoever_looks_after_backward() -> None:
    model = network("ghl")
    (update,) = backward(model)
    assert update.abs().max() == 1  # absmax


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("rule", RULES)
def test_compiled(rule: Any, backend: str, merges: list[int]) -> None:
    """Sums and gradients come in no set order there."""
    model = network(rule, rule, rule)
    expected = [u.clone() for u in backward(model)]
    model.zero_grad()
    merges.clear()
    model.compile(backend=backend, fullgraph=True)
    given = backward(model)
    assert merges == [3]
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_totals_travel_only_where_a_rule_needs_them() -> None:
    for rule in ("ghl", RULES[1], ghl.Rule(normalize="mean"), ghl.Rule(decay="instar")):
        layer = ghl.Linear(3, 2, rule=rule)
        needed = layer.rule.decay == "instar" or layer.rule.normalize == "mean"
        assert (layer._sums.totals is not None) == needed


def test_several_backwards_at_once() -> None:
    """Each has its own; one inside of another ends before it."""
    outer, inner = network("ghl"), network("ghl")
    expected = [u.clone() for model in (outer, inner) for u in backward(model)]
    nn.ModuleList([outer, inner]).zero_grad()
    seen: list[Tensor] = []
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    y = outer(x)

    def within(g: Tensor) -> None:
        with torch.enable_grad():
            seen.extend(backward(inner))

    y.register_hook(within)
    y.square().sum().backward()
    given = [outer[0].weight.grad, inner[0].weight.grad]
    assert seen[0] is inner[0].weight.grad
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_compiled_autograd() -> None:
    """Which traces hooks before there are numbers: each weight is merged at once."""
    model = network("ghl", "ghl")
    expected = [u.clone() for u in backward(model)]
    model.zero_grad()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        given = backward(model)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
