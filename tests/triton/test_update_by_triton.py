"""The update in one call, and a layer's whole backward, by the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LAYOUTS, Conv, Layer, Linear, problem_of
from test_pair_by_triton import DTYPES
from test_update import assert_layer_update
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ghl
import ghl_kernels
from ghl_kernels import Rule
from ghl_kernels.rule import CHOICES
from ghl_kernels.triton import library

LAYERS: dict[str, Layer] = {
    "linear": Linear(37, 17, 14),
    "conv": Conv(2, 16, (4, 5), 13, kernel=(1, 3), padding=(0, 1)),
    "grouped": Conv(2, 6, (4, 5), 15, kernel=(2, 3), stride=(2, 1), padding=(0, 1), groups=3),
    "depthwise": Conv(2, 5, (4, 5), 10, kernel=(2, 3), groups=5),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


@layers
@pytest.mark.parametrize("decay", CHOICES["decay"])
def test_every_decay(layer: Layer, decay: str, fused: None) -> None:
    """`instar` is the one that needs the sums of u; an update may take the memory of H0."""
    assert_layer_update(layer, layer.tensors(), Rule(decay=decay, gate="hebb"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_with_a_weight_in_its_own_or_in_float32(
    dtype: torch.dtype, implementation: str
) -> None:
    layer = LAYERS["linear"]
    x, y, g, w = layer.tensors(dtype)
    for weight in (w, torch.randn_like(w, dtype=torch.float32)):
        assert_layer_update(layer, (x, y, g, weight), Rule())


def test_the_update_of_a_float32_weight_is_not_rounded_to_the_activations(
    implementation: str,
) -> None:
    x, y, g, w = LAYERS["linear"].tensors(torch.float16)
    update = LAYERS["linear"].update((x, y, g, w.float()), Rule())[0]
    assert not torch.equal(update, update.half().float())


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_a_library_reach_the_merge_as_they_are(weights: torch.dtype) -> None:
    """Making them float32 first, or the update another dtype after, is a pass over all of them."""
    layer = LAYERS["conv"]
    x, y, g, w = layer.tensors(torch.bfloat16)
    w = w.to(weights)
    problem, wide = problem_of(layer, torch.bfloat16), []

    class Widened(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                wide.extend([result] if result.numel() == w.numel() else [])
            return result

    with Widened():
        update, *_ = library.update(problem, x, y, g, w, 1.0, "oja", "sign", "absmax")
    wanted = {update.data_ptr()} if weights == torch.float32 else set()
    assert {t.data_ptr() for t in wide} == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_update_has_the_strides_of_the_weight(layout: str, implementation: str) -> None:
    layer = LAYERS["grouped"]
    x, y, g, w = layer.tensors()
    assert_layer_update(layer, (x, y, g, LAYOUTS[layout](w)), Rule())


def test_inputs_are_left_as_they_are(implementation: str) -> None:
    for layer in LAYERS.values():
        tensors = layer.tensors()
        before = [t.clone() for t in tensors]
        layer.update(tensors, Rule())
        assert all(map(torch.equal, tensors, before))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: ghl.Linear(9, 18), (2, 5, 9)),
    "conv": (lambda: ghl.Conv2d(4, 18, (3, 2), (2, 1), (1, 0)), (2, 4, 5, 4)),
    "grouped": (lambda: ghl.Conv2d(4, 18, 2, groups=2), (2, 4, 3, 4)),
    "depthwise": (lambda: ghl.Conv2d(3, 6, 2, groups=3), (2, 3, 3, 4)),
    "same": (lambda: ghl.Conv2d(3, 6, 3, padding="same", dilation=2), (1, 3, 4, 4)),
    "circular": (lambda: ghl.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (1, 3, 4, 4)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("preset", ["ghl", "hebb"])
def test_a_layers_backward_is_the_composed_one(name: str, preset: str, fused: None) -> None:
    """By loss.backward(), whose threads are not the test's, twice through the same layer."""
    build, shape = MODULES[name]
    layer = build()
    layer.rule = preset
    x = torch.randn(shape)

    def gradients() -> list[torch.Tensor]:
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        (layer(inputs).square().sum() + layer(inputs * 0.5).sum()).backward()
        return [inputs.grad, *(p.grad.clone() for p in layer.parameters())]

    with ghl_kernels.force("composed"):
        wanted = gradients()
    for actual, expected in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
