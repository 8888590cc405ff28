"""ghl.Conv2d: every argument of nn.Conv2d, against the reference."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ghl

from .oracle import assert_like_reference

GEOMETRIES = {
    "plain": {},
    "stride": {"stride": 2},
    "stride pair": {"stride": (2, 1)},
    "rectangular": {"kernel_size": (1, 3)},
    "1x1": {"kernel_size": 1},
    "padding": {"padding": 2},
    "padding pair": {"padding": (1, 2)},
    "padding over the kernel": {"padding": 3, "kernel_size": 1},
    "valid": {"padding": "valid"},
    "same odd": {"padding": "same"},
    "same even": {"padding": "same", "kernel_size": 2},
    "same mixed": {"padding": "same", "kernel_size": (4, 3)},
    "same even dilated": {"padding": "same", "kernel_size": (2, 4), "dilation": (3, 1)},
    "same even grouped": {"padding": "same", "kernel_size": 4, "groups": 2},
    "dilation": {"dilation": 2},
    "dilation pair": {"dilation": (1, 2), "padding": (0, 2)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 4},
    "depthwise multiplied": {"groups": 4, "out_channels": 8, "stride": 2, "padding": 1},
    "no bias": {"bias": False},
    "all": {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1), "groups": 2, "bias": False},
}


def conv(**options):
    torch.manual_seed(0)
    defaults = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "dtype": torch.float64}
    return nn.Sequential(nn.Conv2d(**{**defaults, **options}))


def image(*leading, dtype=torch.float64):
    return torch.randn(*leading, 7, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(x):
    def run(model):
        y = model(x)
        generator = torch.Generator().manual_seed(2)
        return (y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum() + y.square().sum()

    return run


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_geometry(geometry, dtype):
    """Stride, padding, dilation, groups and bias give the reference's patches."""
    x = image(3, 4, dtype=dtype)
    assert_like_reference(conv(dtype=dtype, **GEOMETRIES[geometry]), loss_of(x))


@pytest.mark.parametrize("padding", [1, (2, 1), "same"], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(mode, padding):
    """What is padded counts as input, in all modes, even where the sides differ."""
    kernel_size = (2, 4) if padding == "same" else 3
    plain = conv(padding=padding, padding_mode=mode, kernel_size=kernel_size)
    assert_like_reference(plain, loss_of(image(3, 4)))


@pytest.mark.parametrize(
    "changes",
    [
        {"padding": (2, 2), "dilation": (2, 2)},  # strides for dilation, as in segmentation
        {"padding": 0},
        {"padding": [1, 0]},
        {"padding": "valid"},
        {"padding": "same", "dilation": (1, 2)},
        {"stride": 2},
        {"stride": [2, 1], "dilation": 2},
    ],
    ids=str,
)
def test_geometry_changed_after_construction(changes):
    """Whatever nn.Conv2d takes then counts, of the layer's present kernel."""
    plain = conv(padding=1)
    vars(plain[0]).update(changes)
    swapped = copy.deepcopy(plain)
    ghl.swap(swapped)
    assert torch.equal(swapped(image(3, 4)), plain(image(3, 4)))
    loss_of(image(3, 4))(swapped).backward()
    pairs = {n: v if isinstance(v, str) else ghl.layers.height_width(v) for n, v in changes.items()}
    vars(plain[0]).update(pairs)  # as the reference takes them
    model = assert_like_reference(plain, loss_of(image(3, 4)))
    assert torch.equal(swapped[0].weight.grad, model[0].weight.grad)


def test_same_padding_of_strides_is_pytorchs_error():
    model = conv(padding="same")
    ghl.swap(model)
    model[0].stride = 2
    with pytest.raises(ValueError, match="stride is 2, must be 1 with padding='same'"):
        model(image(3, 4))


class Tiled(ghl.Conv2d):
    """Pads around, as diffusion models are made to."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(F.pad(input, (1, 1, 1, 1), mode="circular"), weight, bias)


class Standardized(ghl.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


def test_a_subclass_may_change_what_is_convolved():
    torch.manual_seed(0)
    tiled = Tiled(4, 6, 3, dtype=torch.float64)
    around = ghl.Conv2d(4, 6, 3, padding=1, padding_mode="circular", dtype=torch.float64)
    around.load_state_dict(tiled.state_dict())
    for layer in (tiled, around):
        loss_of(image(3, 4))(layer).backward()
    assert torch.equal(tiled.weight.grad, around.weight.grad)


def test_a_subclass_with_another_weight_has_no_sums():
    """Its forward is what it says, and its gradient is no update."""
    layer = Standardized(4, 6, 3, dtype=torch.float64)
    weight = layer.weight - layer.weight.mean()
    assert torch.equal(layer(image(3, 4)), F.conv2d(image(3, 4), weight, layer.bias))
    with pytest.raises(RuntimeError, match="no layer with a rule gave the sums"):
        loss_of(image(3, 4))(layer).backward()


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_unbatched_input(mode):
    """(C, H, W) is a batch of one."""
    plain = conv(padding=1, padding_mode=mode)
    model = assert_like_reference(plain, loss_of(image(4)))
    assert model(image(4)).shape == plain(image(4)).shape


@pytest.mark.parametrize("preset", ["ghl", "hebb", "sign", "bp"])
def test_presets(preset):
    """Every gate, with groups: all channels of a position compete, across groups."""
    assert_like_reference(conv(groups=2, padding=1), loss_of(image(3, 4)), preset)


@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("input_last", [False, True])
@pytest.mark.parametrize("options", [{}, {"groups": 2, "padding": "same", "kernel_size": 2}])
def test_channels_last(weight_last, input_last, options):
    """Neither memory format changes the update, whose strides are the weight's."""
    plain, x = conv(**options), image(3, 4)
    if weight_last:
        plain.to(memory_format=torch.channels_last)
    if input_last:
        x = x.contiguous(memory_format=torch.channels_last)
    model = assert_like_reference(plain, loss_of(x))
    weight = model[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == weight_last
    assert weight.grad.stride() == weight.stride()


def test_input_with_strides_of_neither_format():
    """A transposed and sliced image is correlated as it looks, not as it lies."""
    x = image(3, 4).transpose(2, 3)[:, :, 1:, ::2]
    assert_like_reference(conv(padding=1), loss_of(x))


def test_eval_mode_and_gradient_of_the_input():
    """eval() changes nothing; the input gets its ordinary gradient, with or without asking."""
    plain, x = conv(padding=1).eval(), image(2, 4).requires_grad_()
    model = assert_like_reference(plain, loss_of(x))
    (given,) = torch.autograd.grad(loss_of(x)(model), x)
    (ordinary,) = torch.autograd.grad(loss_of(x)(plain), x)
    torch.testing.assert_close(given, ordinary)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{"padding": "same", "kernel_size": 2}, {"stride": 2}])
def test_without_gradients_it_is_the_plain_layer(context, options):
    """The same bits as nn.Conv2d, and nothing to differentiate."""
    plain = conv(dtype=torch.float32, **options)
    model = nn.Sequential(*plain)
    ghl.swap(model)
    x = image(2, 4, dtype=torch.float32)
    with context():
        y = model(x)
        assert torch.equal(y, nn.Conv2d.forward(model[0], x))
    assert not y.requires_grad


def test_frozen_bias_and_frozen_weight():
    """A frozen bias gets no gradient, a frozen weight no update."""
    plain = conv()
    plain[0].bias.requires_grad_(False)
    model = assert_like_reference(plain, loss_of(image(2, 4)))
    assert model[0].bias.grad is None

    layer = ghl.Conv2d(4, 6, 3)
    layer.weight.requires_grad_(False)
    layer(image(2, 4, dtype=torch.float32)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"padding": "same", "kernel_size": 2}])
def test_no_images_give_a_zero_update(options):
    """An empty batch is not an error."""
    layer = ghl.Conv2d(4, 6, **{"kernel_size": 3, **options})
    layer(torch.zeros(0, 4, 7, 8)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


class Convolutions(TorchDispatchMode):
    """Which gradients PyTorch's own operators made, asked for or not."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default:
            self.made.append([gradient is not None for gradient in result])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_weight_gradient_is_made_once(bias, dtype):
    """oneDNN makes it with that of a bias."""
    layer = ghl.Conv2d(16, 32, 3, bias=bias, dtype=dtype)
    y = layer(torch.randn(4, 16, 9, 9, dtype=dtype, requires_grad=True))
    with Convolutions() as convolutions:
        y.sum().backward()
    assert convolutions.made == [[True, False, False]]


def test_is_a_conv2d_with_its_arguments():
    """Positional arguments as nn.Conv2d takes them; the rule is keyword or last."""
    arguments = (4, 6, (2, 3), (2, 1), (1, 0), 1, 2, False, "reflect", "cpu", torch.float64)
    torch.manual_seed(3)
    plain = nn.Conv2d(*arguments)
    torch.manual_seed(3)
    layer = ghl.Conv2d(*arguments, rule="sign")
    assert isinstance(layer, nn.Conv2d)
    assert torch.equal(layer.weight, plain.weight)
    assert repr(plain)[:-1] in repr(layer)
    assert "sign_only" in repr(layer)


@pytest.mark.parametrize("shape", [(4, 7), (1, 1, 4, 7, 8)])
def test_wrong_rank_is_the_error_of_torch(shape):
    """An input that is neither an image nor a batch is refused, not reinterpreted."""
    with pytest.raises(RuntimeError, match=r"Expected 3D .* or 4D"):
        ghl.Conv2d(4, 6, 3)(torch.zeros(shape))
