"""What an operator is to PyTorch besides its implementation: autocast, autograd, and its device.

Kernels of dispatch keys. Where nothing asks for one of them a call must not pay for it: a layer's
backward calls operators without gradients, and a GPU waits for what they take on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ghl_kernels.checks import FLOATS

BACKENDS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def autocast_activations(
    operator: Callable[..., Any], device: str, casts: bool
) -> Callable[..., Any]:
    """x, y and g in autocast's dtype, w as it is: sums and updates stay in float32.

    casts: not for a layer's backward, which may be called within a region of autocast though the
    forward was not; nor do operators that it is made of cast then.
    """

    def cast(x: Tensor, y: Tensor, g: Tensor, *rest: object) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            if casts and all(t.dtype in FLOATS for t in (x, y, g)):
                x, y, g = x.to(dtype), y.to(dtype), g.to(dtype)
            return operator(x, y, g, *rest)

    return cast


class WithoutDerivative(torch.autograd.Function):
    """Results of an operator as parts of a graph that cannot be gone through backward."""

    @staticmethod
    def forward(
        ctx: Any, name: str, run: Callable[[], tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.operator = name
        return run()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(f"{ctx.operator} has no derivative; call it under torch.no_grad()")


def after_autograd(keyset: Any) -> Any:
    return keyset & torch._C._after_ADInplaceOrView_keyset


@functools.lru_cache(maxsize=256)
def is_next_a_backend(keyset: int) -> bool:
    """Whether nobody is to see a call with these dispatch keys but autograd and a backend."""
    left = after_autograd(torch._C.DispatchKeySet.from_raw_repr(keyset))
    left = left.remove(torch._C.DispatchKey.BackendSelect)  # of operators without a tensor
    return left.highestPriorityTypeId() in BACKENDS


def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
    """Those among them and in their lists."""
    found: list[Tensor] = []
    for value in arguments:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [one for one in value if isinstance(one, Tensor)]
    return found


def without_derivative(operator: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """Autograd's kernel of an operator that has no derivative.

    run: what the operator does on a CPU and on a GPU, called without another way through the
    dispatcher unless a mode or a subclass of tensors is to see the operator.
    """

    def below(keyset: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if is_next_a_backend(keyset.raw_repr()):
                return run(*arguments)
            return operator.redispatch(after_autograd(keyset), *arguments)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return below(keyset, *arguments)
        structure: Any = None

        def flat() -> tuple[Tensor, ...]:
            nonlocal structure
            results, structure = tree_flatten(below(keyset, *arguments))
            return tuple(results)

        results = WithoutDerivative.apply(operator._schema.name, flat, *tensors_of(arguments))
        return tree_unflatten(list(results), structure)

    return kernel


def below_autograd(run: Callable[..., Any]) -> Callable[..., Any]:
    """Has autograd see nothing of what is inside, whoever wants gradients."""

    def call(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return run(*arguments)

    return call


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: Triton launches kernels there."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if on_gpu else nullcontext()


def on_their_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the device of the tensors the current one."""

    def call(first: Tensor | Sequence[Tensor], *rest: Any) -> Any:
        tensors = [first] if isinstance(first, Tensor) else first
        index = max((t.get_device() for t in tensors if t.is_cuda), default=-1)
        if index < 0 or index == torch.cuda.current_device():
            return run(first, *rest)
        with torch.cuda.device(index):
            return run(first, *rest)

    return call
