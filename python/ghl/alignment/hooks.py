"""What a Monitor hangs on modules and on gradients; without a Monitor behind it, it does nothing.

Hooks see a layer's input and output and hand them on; what is computed from them is in `sums.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghl.alignment.sums import Geometry, Use


def nothing(*args: Any, **kwargs: Any) -> None:
    """What a copied or unpickled hook is: the copy of a model is not measured."""


def inert() -> Callable[..., None]:
    return nothing


class Hook:
    """A callable for a module that neither deepcopy nor pickle takes with it."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self.call(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return inert, ()

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        return nothing


def use_of(module: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> Use:
    """The use that a linear layer or a convolution has just made of its weight."""
    bias: Any = module.bias
    if isinstance(module, nn.Linear):
        return linear_use(x, weight, bias, y)
    assert isinstance(module, nn.Conv2d)
    x, padding = padded(module, x)
    place = Geometry(tuple(module.stride), padding, tuple(module.dilation), module.groups)

    def again(x: Tensor) -> Tensor:
        b = None if bias is None else bias.to(x.dtype)
        return F.conv2d(
            x, weight.to(x.dtype), b, module.stride, padding, module.dilation, module.groups
        )

    return Use(x, y, weight, bias, again, place)


def linear_use(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, neurons: slice = slice(None)
) -> Use:
    def again(x: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    return Use(x, y, weight, bias, again, neurons=neurons)


def padded(module: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """x padded where zeros on both sides do not do, and the padding that is left."""
    left, right, top, bottom = module._reversed_padding_repeated_twice
    if module.padding_mode == "zeros" and left == right and top == bottom:
        return x, (top, left)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    with torch.no_grad():
        return F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)


def on_gradient(y: Tensor, then: Callable[[Tensor], None]) -> None:
    """Call `then` with ∂ℓ/∂y in every backward that reaches y.

    F.linear of three dimensions returns a view, whose own node an in-place operation cuts off; so
    there the node below is watched, and its gradient has the rows in one dimension.
    """
    node = y.grad_fn
    while y._is_view() and node is not None and node.name() in ("ViewBackward0", "TBackward0"):
        node = node.next_functions[0][0]
    if node is None or node is y.grad_fn:
        y.register_hook(then)
        return

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is not None:
            then(gradients[0])

    node.register_prehook(before)
