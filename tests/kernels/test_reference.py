"""The reference against the paper: literal loops over samples and patches, and autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghl_kernels import Rule, reference

MODES = ("zeros", "reflect", "replicate", "circular")


def softmax_of(logits: list[float]) -> list[float]:
    exponentials = [math.exp(v - max(logits)) for v in logits]
    return [e / sum(exponentials) for e in exponentials]


def oja_by_samples(rows: Tensor, y: Tensor, w: Tensor, tau: float) -> Tensor:
    """The paper's sum over samples of u_k (x_i - (w_k . x) w_ki), one number at a time."""
    H = torch.zeros_like(w)
    for x, logits in zip(rows, y, strict=True):
        u = softmax_of([v / tau for v in logits.tolist()])
        for k in range(w.shape[0]):
            activation = sum(float(w[k, i]) * float(x[i]) for i in range(w.shape[1]))
            for i in range(w.shape[1]):
                H[k, i] += u[k] * (x[i] - activation * w[k, i])
    return H


def source(index: int, size: int, mode: str) -> int | None:
    """Where a padded index comes from in an image line of `size`; None where it is zero."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return None
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return 0 if index < 0 else size - 1
    return -index if index < 0 else 2 * (size - 1) - index


def patches_by_loops(
    x: Tensor, w: Tensor, y: Tensor, first: tuple[int, int], stride: int, dilation: int, mode: str
) -> Tensor:
    """(positions, in_channels, kh, kw): every patch, element by element; `first` pads the start."""
    patches = x.new_zeros(x.shape[0], *y.shape[2:], x.shape[1], *w.shape[2:])
    for n, h, v, c, i, j in itertools.product(*(range(size) for size in patches.shape)):
        at_h = source(h * stride + i * dilation - first[0], x.shape[2], mode)
        at_v = source(v * stride + j * dilation - first[1], x.shape[3], mode)
        if at_h is not None and at_v is not None:
            patches[n, h, v, c, i, j] = x[n, c, at_h, at_v]
    return patches.flatten(0, 2)


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_linear_is_the_papers_sum_over_samples(tau: float) -> None:
    x, y, g, w = (torch.randn(s).double() for s in ((7, 3), (7, 4), (7, 4), (4, 3)))
    update = reference.linear_update(x, y, g, w, Rule(tau=tau))
    torch.testing.assert_close(update.H, oja_by_samples(x, y, w, tau))
    torch.testing.assert_close(
        update.update, update.G.sign() * update.H.abs() / update.H.abs().max()
    )


def test_oja_term_needs_no_second_pass() -> None:
    """The sum of u (w . x) over the samples is <H0, w>, neuron by neuron."""
    x, y, g, w = (torch.randn(s).double() for s in ((9, 5), (9, 3), (9, 3), (3, 5)))
    u = torch.softmax(y, 1)
    H0 = reference.linear_update(x, y, g, w).H0
    torch.testing.assert_close((u * (x @ w.T)).sum(0), (H0 * w).sum(1))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding"),
    [((2, 4), 1, 1, "same"), ((2, 3), 1, 2, "same"), ((3, 2), 2, 1, 1), ((3, 3), 1, 2, 2)],
)
def test_convolution_is_a_linear_layer_over_its_patches(
    mode: str, kernel: tuple[int, int], stride: int, dilation: int, padding: str | int
) -> None:
    """Patches found by index arithmetic; `same` with an even kernel pads one more at the end."""
    layer = nn.Conv2d(2, 3, kernel, stride, padding, dilation, bias=False, padding_mode=mode)
    layer, x = layer.double(), torch.randn(2, 2, 5, 6).double()
    y = layer(x).detach()
    g, w = torch.randn_like(y), layer.weight.detach()
    first = (dilation * (kernel[0] - 1) // 2, dilation * (kernel[1] - 1) // 2)
    if not isinstance(padding, str):
        first = (padding, padding)

    rows = patches_by_loops(x, w, y, first, stride, dilation, mode).flatten(1)
    y_rows, g_rows = (t.movedim(1, -1).flatten(0, 2) for t in (y, g))
    torch.testing.assert_close(rows @ w.flatten(1).T, y_rows)
    wanted = reference.linear_update(rows, y_rows, g_rows, w.flatten(1))
    update = reference.conv2d_update(
        x, y, g, w, "ghl", stride, padding, dilation, padding_mode=mode
    )
    for name, value in wanted._asdict().items():
        torch.testing.assert_close(getattr(update, name).flatten(1), value, msg=name)
    torch.testing.assert_close(
        update.H.flatten(1), oja_by_samples(rows, y_rows, w.flatten(1), tau=1.0)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": (1, 4), "padding": "same"},
        {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 2)},
        {"kernel_size": 2, "padding": "valid", "stride": 2},
        {"kernel_size": (3, 2), "padding": (2, 1), "stride": (2, 3), "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 4},
    ],
    ids=str,
)
def test_G_is_the_weight_gradient_of_autograd(mode: str, arguments: dict) -> None:
    layer = nn.Conv2d(4, 8, **arguments, padding_mode=mode).double()
    x = torch.randn(2, 4, 7, 8).double()
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups, mode
    update = reference.conv2d_update(x, y.detach(), g, layer.weight.detach(), "bp", *geometry)
    torch.testing.assert_close(update.update, layer.weight.grad)
    torch.testing.assert_close(update.G, layer.weight.grad)


def test_G_of_a_linear_layer_with_leading_dimensions() -> None:
    layer, x = nn.Linear(4, 3).double(), torch.randn(2, 5, 4).double()
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    update = reference.linear_update(x, y.detach(), g, layer.weight.detach(), "bp")
    torch.testing.assert_close(update.update, layer.weight.grad)


def test_all_channels_of_a_position_compete_across_groups() -> None:
    """Depthwise: each channel's H0 is its share of all channels, times its own input."""
    x, y = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    update = reference.conv2d_update(x, y, y, torch.zeros(3, 1, 1, 1).double(), groups=3)
    wanted = (torch.softmax(y, 1) * x).sum((0, 2, 3))
    torch.testing.assert_close(update.H0.flatten(), wanted)


def test_competitions() -> None:
    """Softmax sums to 1, hard is the first of the largest, softhebb negates every loser."""
    y = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 1.0]]).double()
    soft = reference.compete(y, Rule(tau=0.5))
    wanted = [softmax_of([v / 0.5 for v in row]) for row in y.tolist()]
    torch.testing.assert_close(soft, torch.tensor(wanted).double())
    hard = reference.compete(y, Rule(competition="hard"))
    assert hard.tolist() == [[0, 1, 0], [1, 0, 0]]
    torch.testing.assert_close(
        reference.compete(y, Rule(competition="softhebb", tau=0.5)), soft * (2 * hard - 1)
    )
    assert reference.compete(y, Rule(competition="linear")) is y


@pytest.mark.parametrize("competition", ["softmax", "hard", "softhebb"])
def test_a_nan_fills_its_row_of_the_competition_only(competition: str) -> None:
    y = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]])
    u = reference.compete(y, Rule(competition=competition))
    assert u[0].isnan().all()
    assert not u[1].isnan().any()


def test_decays() -> None:
    H0, w, u_sum = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3)
    oja = H0 - (H0 * w).sum(1, keepdim=True) * w
    torch.testing.assert_close(reference.decayed(H0, u_sum, w, Rule()), oja)
    instar = H0 - u_sum[:, None] * w
    torch.testing.assert_close(reference.decayed(H0, u_sum, w, Rule(decay="instar")), instar)
    assert reference.decayed(H0, u_sum, w, Rule(decay="none")) is H0


def test_gates() -> None:
    """sign(G)|H|, -H, sign(G) or G; a zero gradient lets nothing pass."""
    G, H = torch.tensor([[2.0, -3.0, 0.0, -0.0]]), torch.tensor([[-1.0, -2.0, 4.0, 5.0]])
    w, u_sum = torch.zeros_like(G), torch.ones(1)
    wanted = {
        "sign": [[1, -2, 0, 0]],
        "hebb": [[1, 2, -4, -5]],
        "sign_only": [[1, -1, 0, 0]],
        "gradient": [[2, -3, 0, 0]],
    }
    for gate, update in wanted.items():
        rule = Rule(gate=gate, normalize="none")
        assert reference.merge(G, H, u_sum, 1, w, rule).update.tolist() == update, gate


def test_normalizations() -> None:
    """absmax: the largest is 1 and a repeated batch changes nothing; mean: by the rows."""
    x, y, g, w = (torch.randn(s).double() for s in ((6, 3), (6, 4), (6, 4), (4, 3)))
    twice = [torch.cat([t, t]) for t in (x, y, g)]
    for normalize in ("absmax", "mean"):
        rule = Rule(normalize=normalize)
        once = reference.linear_update(x, y, g, w, rule)
        torch.testing.assert_close(
            reference.linear_update(*twice, w, rule).update, once.update, msg=normalize
        )
    assert reference.linear_update(x, y, g, w, Rule()).update.abs().max() == 1
    torch.testing.assert_close(once.update.abs(), once.H.abs() / 6)
    summed = reference.linear_update(x, y, g, w, Rule(normalize="none"))
    torch.testing.assert_close(summed.update.abs(), summed.H.abs())


def test_nan_in_a_gradient_is_not_a_zero_sign() -> None:
    assert reference.sign(torch.tensor([float("nan"), 0.0, -2.0])).isnan().tolist() == [1, 0, 0]


@pytest.mark.parametrize("normalize", ["absmax", "mean", "none"])
def test_an_empty_batch_updates_nothing(normalize: str) -> None:
    rule, w = Rule(normalize=normalize), torch.randn(4, 3, 2, 2)
    x, y = torch.randn(0, 3, 5, 5), torch.randn(0, 4, 4, 4)
    assert torch.equal(reference.conv2d_update(x, y, y, w, rule).update, torch.zeros_like(w))
    x, y, w = torch.randn(0, 3), torch.randn(0, 4), torch.randn(4, 3)
    assert torch.equal(reference.linear_update(x, y, y, w, rule).update, torch.zeros_like(w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_is_the_same_rule(dtype: torch.dtype) -> None:
    tensors = [torch.randn(s).to(dtype) for s in ((5, 3), (5, 4), (5, 4), (4, 3))]
    update = reference.linear_update(*tensors)
    exact = reference.linear_update(*(t.double() for t in tensors))
    assert update.update.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(update.H0.double(), exact.H0, rtol=0, atol=40 * eps)


def test_unfold_of_pytorch_agrees_on_the_patches() -> None:
    x, g = torch.randn(2, 4, 6, 5).double(), torch.randn(2, 3, 3, 2).double()
    w = torch.randn(3, 4, 2, 3).double()
    unfolded = F.unfold(x, (2, 3), dilation=2, padding=1, stride=2)
    wanted = torch.einsum("nkp,ncp->kc", g.flatten(2), unfolded)
    G = reference.conv2d_update(x, g, g, w, "bp", 2, 1, 2).G
    torch.testing.assert_close(G.flatten(1), wanted)
