"""What looks at a network without a backward of its own sees the plain layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import ghl


@pytest.fixture
def networks() -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, the same swapped, and an input."""
    plain, swapped = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
        for _ in range(2)
    )
    swapped.load_state_dict(plain.state_dict())
    ghl.swap(swapped, types=(nn.Conv2d, nn.Linear))
    return plain, swapped, torch.randn(5, 2, 4, 4)


def test_fx(networks: tuple[nn.Module, nn.Module, Tensor]) -> None:
    plain, swapped, x = networks
    assert torch.equal(torch.fx.symbolic_trace(swapped)(x), plain(x))


def test_jit_trace(networks: tuple[nn.Module, nn.Module, Tensor]) -> None:
    plain, swapped, x = networks
    assert torch.equal(torch.jit.trace(swapped, x)(x), plain(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(networks: tuple[nn.Module, nn.Module, Tensor], strict: bool) -> None:
    """Without a word of what a layer keeps for its rule."""
    plain, swapped, x = networks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported = torch.export.export(swapped, (x,), strict=strict)
    assert torch.equal(exported.module()(x), plain(x))


def test_torch_func(networks: tuple[nn.Module, nn.Module, Tensor]) -> None:
    """Maps over samples, Jacobians and gradients of functions are the plain network's."""
    plain, swapped, x = networks
    for transform in (torch.vmap, torch.func.jacrev, torch.func.jacfwd):
        one = x[:, None] if transform is torch.vmap else x
        torch.testing.assert_close(transform(swapped)(one), transform(plain)(one))

    def loss(parameters: dict[str, Tensor], model: nn.Module) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    given, wanted = (
        torch.func.grad(loss)({n: p.detach() for n, p in model.named_parameters()}, model)
        for model in (swapped, plain)
    )
    torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.jacrev])
def test_torch_func_compiled(
    networks: tuple[nn.Module, nn.Module, Tensor], transform: Callable[..., Any]
) -> None:
    """In one graph with the layers, and around a graph of theirs."""
    plain, swapped, x = networks
    one = x[:, None] if transform is torch.vmap else x
    expected = transform(plain)(one)
    around = torch.compile(swapped, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch._dynamo.reset()
        inside = transform(lambda x: swapped(x))
        given = torch.compile(inside, backend="aot_eager", fullgraph=True)(one)
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(transform(around)(one), expected)
    around(x).square().sum().backward()
    assert swapped[0].weight.grad.abs().max() == 1


def test_backward_is_the_rules_afterwards(networks: tuple[nn.Module, nn.Module, Tensor]) -> None:
    plain, swapped, x = networks
    torch.func.jacrev(swapped)(x)
    swapped(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert swapped[0].weight.grad.abs().max() == 1
    torch.testing.assert_close(swapped[0].bias.grad, plain[0].bias.grad)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("transform", [torch.vmap, torch.func.jacrev])
def test_a_backward_through_a_transform_is_an_error(
    networks: tuple[nn.Module, nn.Module, Tensor], transform: Callable[..., Any], held: bool
) -> None:
    """G would be of all uses of a weight and H of those outside, as of a network's equation and of
    its boundary."""
    _, swapped, x = networks
    optimizer = torch.optim.SGD(swapped.parameters(), 0.1)
    if held:
        ghl.synchronize(swapped, optimizer)
    one = x[:, None] if transform is torch.vmap else x
    loss = transform(swapped)(one).square().mean() + swapped(x).square().mean()
    with pytest.raises(RuntimeError, match=r"through a transform of torch.func \(vmap"):
        loss.backward()


def test_a_backward_through_a_transform_of_what_has_no_rule(
    networks: tuple[nn.Module, nn.Module, Tensor],
) -> None:
    """sign_only makes its update of G alone, and bp makes none."""
    plain, swapped, x = networks
    for model in (plain, swapped):
        model.zero_grad()
    swapped[0].rule, swapped[3].rule = "sign", "bp"
    for model in (plain, swapped):
        torch.vmap(model)(x[:, None]).square().mean().backward()
    torch.testing.assert_close(swapped[0].weight.grad, plain[0].weight.grad.sign())
    torch.testing.assert_close(swapped[3].weight.grad, plain[3].weight.grad)


@pytest.mark.parametrize("held", [False, True])
def test_autograd_grad_through_a_transform(
    networks: tuple[nn.Module, nn.Module, Tensor], held: bool
) -> None:
    """Gives the ordinary gradient, as everywhere, and leaves nothing behind."""
    plain, swapped, x = networks
    optimizer = torch.optim.SGD(swapped.parameters(), 0.1)
    if held:
        ghl.synchronize(swapped, optimizer)
    given, wanted = (
        torch.autograd.grad(torch.vmap(model)(x[:, None]).square().mean(), [*model.parameters()])
        for model in (swapped, plain)
    )
    torch.testing.assert_close(given, wanted)
    swapped(x).square().sum().backward()
    optimizer.step()
    assert swapped[0].weight.grad.abs().max() == 1


def test_a_backward_to_other_parameters_through_a_transform(
    networks: tuple[nn.Module, nn.Module, Tensor],
) -> None:
    """Given by functional_call: the ordinary gradients by autograd.grad, no update in backward."""
    plain, swapped, x = networks
    gradients = []
    for model in (plain, swapped):
        given = {n: nn.Parameter(p.detach().clone()) for n, p in plain.named_parameters()}

        def loss(model: nn.Module = model, given: Any = given) -> Tensor:
            def run(one: Tensor) -> Tensor:
                return torch.func.functional_call(model, given, (one[None],))

            return torch.vmap(run)(x).square().mean()

        gradients.append(torch.autograd.grad(loss(), [*given.values()]))
    torch.testing.assert_close(*gradients)
    with pytest.raises(RuntimeError, match=r"through a transform of torch\.func"):
        loss().backward()


@pytest.mark.parametrize("how", ["replaced", "thawed"])
def test_a_weight_that_no_forward_has_used_yet_through_a_transform(how: str) -> None:
    layer, x = ghl.Linear(4, 3), torch.randn(5, 4)
    if how == "replaced":
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    else:
        layer = ghl.Linear(4, 3, rule="bp").requires_grad_(False)
        layer.rule = "ghl"
        layer.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"through a transform of torch\.func"):
        torch.vmap(layer)(x).square().sum().backward()
