"""What `torch.utils.flop_counter` counts of the operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Conv, Linear
from torch.utils.flop_counter import FlopCounterMode

import ghl
from ghl_kernels import Rule, flops

LAYERS = {
    "linear": Linear(7, 5, 4),
    "convolution": Conv(2, 4, (6, 5), 6, kernel=(3, 2), stride=(1, 2), padding=(1, 0)),
    "groups": Conv(2, 4, (6, 5), 6, kernel=(3, 2), dilation=(2, 1), groups=2),
    "one neuron": Conv(2, 3, (4, 4), 1),
}


def counted(run: Callable[[], object]) -> int:
    flops.register()
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_layer_has_the_flops_of_two_forwards(layer: Linear | Conv) -> None:
    """As many as two weight gradients, of which PyTorch counts too many where there are groups."""
    x, y, g, w = layer.tensors()
    if isinstance(layer, Linear):
        forward = counted(lambda: torch.nn.functional.linear(x, w))
    else:
        forward = counted(lambda: torch.nn.functional.conv2d(x, w, None, *layer.geometry))
    pair = counted(lambda: layer.pair((x, y, g, w), Rule()))
    update = counted(lambda: layer.update((x, y, g, w), Rule()))
    assert pair == update == 2 * forward > 0


def test_the_backward_of_a_layer_is_counted() -> None:
    x, layer = torch.randn(2, 4, 6, 5), ghl.Conv2d(4, 6, 3)
    y = layer(x)
    assert counted(y.sum().backward) == 2 * counted(lambda: layer(x))
