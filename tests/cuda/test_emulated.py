"""The implementation `cuda` from the operators to its kernels, on the host.

What the kernels compute is tested in tests/csrc on many more shapes; here it is that Python and the
seam tell them the right layer.
"""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, Conv, Layer, Linear, assert_pair, problem_of

import ghl_kernels
from ghl_kernels import Problem, Rule, composed
from ghl_kernels.cuda import kernels
from ghl_kernels.pairs import Task
from ghl_kernels.splits import Partials
from ghl_kernels.tuning import tiles

pytestmark = pytest.mark.usefixtures("emulated")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32

LAYERS: dict[str, tuple[Layer, torch.dtype, str]] = {
    "linear": (Linear(70, 40, 24), BFLOAT, "softmax"),
    "linear_long_rows": (Linear(35, 16, 300), HALF, "softhebb"),
    "linear_one_neuron": (Linear(5, 3, 1), FLOAT, "softmax"),
    "linear_by_number": (Linear(33, 7, 5), BFLOAT, "hard"),
    "linear_u_is_y": (Linear(33, 16, 80), HALF, "linear"),
    "pointwise": (Conv(2, 16, (5, 4), 24, (1, 1)), BFLOAT, "softmax"),
    "conv": (Conv(2, 8, (5, 6), 16, padding=(1, 1)), HALF, "softmax"),
    "conv_geometry": (Conv(2, 8, (7, 9), 72, (3, 2), (2, 1), (1, 0), (1, 2)), HALF, "softmax"),
    "conv_three_channels": (Conv(2, 3, (6, 5), 16, padding=(1, 1)), FLOAT, "softmax"),
    "conv_folded_as_resnet": (Conv(2, 3, (9, 8), 16, (7, 7), (2, 2), (3, 3)), HALF, "softmax"),
    "conv_folded_one_position": (Conv(9, 3, (4, 4), 16, (4, 4), (4, 4)), FLOAT, "softmax"),
    "conv_folded_one_tap": (Conv(2, 4, (5, 6), 16, (1, 2), (2, 1)), BFLOAT, "softhebb"),
    "conv_folded_dilated": (Conv(2, 1, (7, 5), 72, (3, 2), dilation=(2, 1)), FLOAT, "hard"),
    "conv_not_foldable": (Conv(2, 3, (5, 7), 16, (2, 2), dilation=(1, 2)), HALF, "softmax"),
    "groups": (Conv(2, 16, (4, 5), 16, padding=(1, 1), groups=2), BFLOAT, "hard"),
    "depthwise": (Conv(1, 4, (5, 4), 8, padding=(1, 1), groups=4), HALF, "softmax"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str) -> None:
    layer, dtype, competition = LAYERS[name]
    assert_pair(layer, layer.tensors(dtype), Rule(competition=competition, tau=0.7))
    assert ghl_kernels.last("linear_pair" if isinstance(layer, Linear) else "conv2d_pair") == (
        ghl_kernels.Backend("cuda", "forced")
    )


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("conv")])
def test_few_channels_are_copied_wide_where_they_can_be(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernels are told then are 16 channels or more, of one column and no padding."""
    layer, dtype, _ = LAYERS[name]
    told, own = [], kernels.wgrad

    def wgrad(strategy: str, task: Task, partials: Partials) -> None:
        told.append((task.x.shape[1], task.problem))
        own(strategy, task, partials)

    monkeypatch.setattr(kernels, "wgrad", wgrad)
    layer.pair(layer.tensors(dtype), Rule())
    ((channels, problem),) = told
    if tiles.folds(problem_of(layer, dtype)):
        assert channels % 16 == 0 and problem.kernel_size[1] == 1
        assert (problem.stride, problem.padding) == ((1, 1), (0, 0))
    else:
        assert channels == layer.channels


@pytest.mark.parametrize("channels", [16, 3], ids=["conv", "few_channels"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_convolution(layout: str, channels: int) -> None:
    layer = Conv(2, channels, (4, 5), 8, padding=(1, 1))
    assert_pair(layer, [LAYOUTS[layout](t) for t in layer.tensors(HALF)])


def test_float32_in_tf32() -> None:
    """To its three digits: its tolerance is not that of float32."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    layer = Linear(40, 12, 20)
    tensors = layer.tensors()
    exact, pair = (
        layer.reference([t.double() for t in tensors], Rule()),
        layer.pair(tensors, Rule()),
    )
    for actual, wanted in zip(pair, (exact.G, exact.H0), strict=False):
        error = (actual - wanted).abs().max() / wanted.abs().max()
        assert 1e-6 < error < 2e-3


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("argument", [0, 2], ids=["x", "g"])
def test_an_infinity_stays_one(argument: int, dtype: torch.dtype) -> None:
    """Also where float32 is multiplied in parts: times the rest of a number it would be NaN."""
    layer = Linear(20, 9, 11)
    tensors = layer.tensors(dtype)
    tensors[argument][3, 4] = float("-inf")
    G, *_ = layer.pair(tensors, Rule())
    exact = layer.reference([t.double() for t in tensors], Rule()).G
    assert not G.isnan().any() and torch.equal(G.isinf(), exact.isinf())
    assert torch.equal(G[G.isinf()].sign(), exact[exact.isinf()].sign().float())


def test_expanded_gradients_and_sums_nobody_asked_for() -> None:
    layer = Linear(20, 9, 11)
    x, y, _, w = layer.tensors(HALF)
    g = torch.ones((), dtype=HALF).expand(y.shape)
    G, H0, totals = torch.ops.ghl_kernels.linear_pair(x, y, g, w, "softmax", 1.0, "rows")
    torch.testing.assert_close(G, x.float().sum(0).expand(11, 9), rtol=1e-3, atol=1e-3)
    assert totals.shape == (12,) and totals[-1] == 20
    assert torch.isfinite(H0).all()


@pytest.mark.parametrize("shape", [(0, 5, 6), (4, 0, 6)], ids=["no_rows", "no_inputs"])
def test_an_empty_layer(shape: tuple[int, int, int]) -> None:
    layer = Linear(*shape)
    tensors, rule = layer.tensors(), ("softmax", 1.0)
    results = torch.ops.ghl_kernels.linear_pair(*tensors, *rule)
    problem = Problem.of_linear(tensors[0], tensors[3], totals="sums")
    for actual, wanted in zip(results, composed.pair(problem, *tensors, 1.0), strict=True):
        torch.testing.assert_close(actual, wanted)
    update = layer.update(tensors, Rule())[0]
    assert update.shape == tensors[3].shape and not update.any()


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_logsumexp(dim: int, dtype: torch.dtype) -> None:
    y = 30 * torch.randn(6, 33, 5).to(dtype)
    found = torch.ops.ghl_kernels.logsumexp(y, 0.3, dim)
    torch.testing.assert_close(found, composed.logsumexp(y, 0.3, dim), rtol=1e-5, atol=1e-4)


CHOICES = [("oja", "sign", "absmax"), ("instar", "hebb", "mean"), ("none", "sign_only", "none")]


@pytest.mark.parametrize("choices", CHOICES, ids="-".join)
def test_merges_of_layers_of_many_dtypes(choices: tuple[str, str, str]) -> None:
    layers = []
    for shape, dtype in (((20, 9), FLOAT), ((3, 8, 3, 3), BFLOAT), ((1, 1), HALF)):
        G, H0, w = (torch.randn(shape).to(dtype) for _ in range(3))
        layers.append((G, H0.float(), torch.rand(shape[0] + 1) + 1, w))
    layers[1] = tuple(
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in layers[1]
    )
    lists = [list(one) for one in zip(*layers, strict=True)]
    together = list(zip(*torch.ops.ghl_kernels.foreach_merge(*lists, *choices), strict=True))
    for layer, found in zip(layers, together, strict=True):
        wanted = composed.merge(*layer, *choices)
        for single, one, exact in zip(
            torch.ops.ghl_kernels.merge(*layer, *choices), found, wanted, strict=True
        ):
            assert torch.equal(single, one) and one.stride() == exact.stride()
            loose = 1e-2 if layer[0].dtype != FLOAT else 1e-5
            torch.testing.assert_close(one, exact, rtol=loose, atol=loose * exact.abs().max())


def test_an_update_is_the_pair_and_its_merge() -> None:
    layer, rule = Conv(2, 8, (5, 6), 16, padding=(1, 1)), Rule(tau=0.5)
    tensors = layer.tensors(HALF)
    update, *_ = layer.update(tensors, rule)
    sums = layer.pair(tensors, rule)
    merged, *_ = torch.ops.ghl_kernels.merge(*sums, tensors[3], "oja", "sign", "absmax")
    assert update.dtype == HALF and torch.equal(update, merged.half())
