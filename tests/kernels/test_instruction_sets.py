"""Every instruction set the library was compiled for and this processor has, not just the fastest.

The rest of the tests run the fastest one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import LAYOUTS, Conv, Linear, assert_pair

import ghl_kernels
from ghl_kernels import Rule, library
from ghl_kernels.rule import CHOICES

LAYERS = {
    "tails": Conv(3, 5, (9, 8), 19, kernel=(3, 2), padding=(1, 1)),
    "several_tiles": Conv(5, 3, (12, 11), 31, kernel=(3, 3), padding=(1, 1)),
    "groups": Conv(2, 8, (9, 9), 36, stride=(2, 1), dilation=(1, 2), groups=2),
    "linear": Linear(300, 37, 50),
    "one_row": Linear(1, 16, 13),
}


@pytest.fixture(params=["avx512", "avx2", "generic"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Makes the library take one set of kernels, for the duration of a test."""
    compiled, module = library.serving("cpu"), library.introspection()
    if module is None or compiled is None or not compiled.loaded:
        pytest.skip("no native kernels")
    path = str(compiled.path)
    before = module.instruction_set(path)
    try:
        module.use_instruction_set(path, request.param)
    except ValueError as error:
        pytest.skip(str(error))
    assert module.instruction_set(path) == request.param
    with ghl_kernels.force("native"):
        yield request.param
    module.use_instruction_set(path, before)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("competition", CHOICES["competition"])
def test_pair(instruction_set: str, name: str, competition: str) -> None:
    """G, H0 and totals, in float32 and float64, from both memory orders."""
    layer, rule = LAYERS[name], Rule(competition=competition, tau=0.5)
    layouts = ["contiguous", "channels_last"] if isinstance(layer, Conv) else ["contiguous"]
    for dtype, layout in itertools.product((torch.float32, torch.float64), layouts):
        assert_pair(layer, [LAYOUTS[layout](t) for t in layer.tensors(dtype)], rule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(instruction_set: str, dtype: torch.dtype) -> None:
    assert_pair(LAYERS["tails"], LAYERS["tails"].tensors(dtype))


def test_update(instruction_set: str) -> None:
    """The merge too: it agrees with the composition of PyTorch's operators in magnitude."""
    layer = LAYERS["tails"]
    tensors = layer.tensors(torch.float64)
    update, neurons, total = layer.update(tensors, Rule())
    with ghl_kernels.force("composed"):
        expected = layer.update(tensors, Rule())
    for actual, of_torch in zip((update, neurons, total), expected, strict=True):
        torch.testing.assert_close(actual, of_torch, rtol=1e-10, atol=1e-12)


def test_an_unknown_set_is_refused() -> None:
    compiled, module = library.serving("cpu"), library.introspection()
    if module is None or compiled is None or not compiled.loaded:
        pytest.skip("no native kernels")
    with pytest.raises(ValueError, match="sse9 does not run here"):
        module.use_instruction_set(str(compiled.path), "sse9")
