"""What a Monitor sees of modules and of gradients.

Hooks see a layer's input and output and hand them on; what is computed from them is in `sums.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghl.alignment.sums import Geometry, Use
from ghl.layers import height_width, padded


def use_of(module: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> Use:
    """The use that a linear layer or a convolution has just made of its weight."""
    bias: Any = module.bias
    if isinstance(module, nn.Linear):
        return linear_use(x, weight, bias, y)
    assert isinstance(module, nn.Conv2d)
    with torch.no_grad():
        x, padding = padded(module, x)
    stride, dilation = height_width(module.stride), height_width(module.dilation)
    place = Geometry(stride, padding, dilation, module.groups)

    def again(x: Tensor) -> Tensor:
        b = None if bias is None else bias.to(x.dtype)
        return F.conv2d(
            x, weight.to(x.dtype), b, place.stride, padding, place.dilation, place.groups
        )

    return Use(x, y, weight, bias, again, place)


def linear_use(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, neurons: slice = slice(None)
) -> Use:
    def again(x: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    return Use(x, y, weight, bias, again, neurons=neurons)


# which input of a layer's node is the weight, and whether it is the transposed one
WEIGHTS = {
    "AddmmBackward0": (2, True),
    "MmBackward0": (1, True),
    "ConvolutionBackward0": (1, False),
}
RESHAPING = ("ViewBackward0", "UnsafeViewBackward0", "SqueezeBackward1")


def producer(use: Use, y: Tensor) -> Any:
    """The node of the graph that has multiplied, below those that reshape and that add the bias."""
    node = y.grad_fn
    while node is not None:
        children = [child for child, _ in node.next_functions]
        bias = use.bias_leaf
        adds = node.name() == "AddBackward0" and bias is not None and leaf(children[1]) is bias
        if not adds and node.name() not in RESHAPING:
            return node
        node = children[0]
    return node


def leaf(node: Any) -> Tensor | None:
    """The leaf that a node passes gradients to through casts, slices and transposes alone."""
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def is_product(use: Use, y: Tensor) -> bool:
    """Whether y comes straight from an operation on the weight; no longer so if another hook, or a
    forward that was replaced, has made something of y."""
    node = producer(use, y)
    children = () if node is None else node.next_functions
    return any(leaf(child) is use.leaf for child, _ in children)


def on_gradient(use: Use, y: Tensor, then: Callable[[Tensor, Tensor | None], None]) -> None:
    """Call `then` with ∂ℓ/∂y, and what it makes ∂ℓ/∂W if that is computed, in every backward that
    reaches y.

    Watched is the node that multiplies, whose gradients have the rows in one dimension: F.linear
    of three dimensions returns a view of it, whose own node an operation in place cuts off.
    """
    node = producer(use, y)
    if node is None or node.name() not in WEIGHTS:
        y.register_hook(lambda g: then(g, None))
        return
    place, transposed = WEIGHTS[node.name()]

    def after(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
        g, G = outputs[0], inputs[place]
        unwanted = G is None and not torch.is_grad_enabled()  # this backward is of other inputs
        if g is not None and not unwanted:
            then(g, G.T if G is not None and transposed else G)

    node.register_hook(after)
