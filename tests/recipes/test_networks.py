"""The networks: their sizes as published, their images, their shortcuts."""

import pytest
import torch

from ghl.recipes import models
from ghl.recipes.config import Config
from ghl.recipes.resnet import Block


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_deephebb_is_the_authors():
    model = models.build("deephebb", 3, 10, 32, 1.0)
    convolutions = 96 * 3 * 25 + 384 * 96 * 9 + 1536 * 384 * 9
    assert parameters(model) == convolutions + 1536 * 4 * 4 * 10 + 10


def test_fasthebb_is_the_authors():
    model = models.build("fasthebb", 3, 10, 32, 1.0)
    convolutions = 96 * 3 * 25 + (128 * 96 + 192 * 128 + 256 * 192) * 9
    dense = (256 * 3 * 3 + 1) * 4096 + 2 * 4096 + 4096 * 10 + 10
    assert parameters(model) == convolutions + dense


def test_forms_for_imagenet_have_the_classifiers_of_the_cifar_forms():
    for size in (64, 96):
        deep = models.build("deephebb-imagenet", 3, 1000, size, 0.25)
        fast = models.build("fasthebb-imagenet", 3, 1000, size, 0.25)
        assert deep.classifier.in_features == 768 * 4 * 4
        assert fast.fc5.in_features == 64 * 3 * 3
    names = [name for name, m in deep.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert set(names) == Config.resolve({"arch": "deephebb-imagenet"}).tau.keys()


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_published_size(depth, millions):
    model = models.build(f"resnet{depth}", 3, 10, 32, 1.0)
    assert parameters(model) / 1e6 == pytest.approx(millions, rel=0.03)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == depth - 1


def test_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros():
    block = Block(2, 5, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 2, 6, 6)
    y = block(x)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert torch.equal(y[:, 2:], torch.zeros(1, 3, 3, 3))


def test_initialisation_is_kaiming_normal_with_fan_in():
    torch.manual_seed(0)
    weight = models.build("deephebb", 1, 10, 8, 1.0).conv3.weight
    assert weight.std().item() == pytest.approx((2 / (384 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("name", [*models.OWN, "squeezenet1_1", "mobilenet_v2", "vgg11_bn"])
def test_smallest_image_passes(name):
    if name == "resnet1202":
        pytest.skip("the same code as resnet110, and slow")
    wanted = models.architecture(name)
    width = 0.1 if name.endswith("imagenet") else 1.0
    model = models.build(name, wanted.channels or 1, 7, wanted.smallest, width)
    images = torch.rand(2, wanted.channels or 1, wanted.smallest, wanted.smallest)
    assert model.training
    assert model(images).shape == (2, 7)


def test_width_scales_the_channels():
    assert models.build("deephebb", 1, 10, 8, 0.25).conv3.weight.shape == (384, 96, 3, 3)
    assert models.build("resnet20", 1, 10, 8, 0.01).conv1.out_channels == 1


@pytest.mark.parametrize(
    ("name", "size", "width", "message"),
    [
        ("deephep", 8, 1.0, "--arch is 'deephep'.*'deephebb'"),
        ("resnet50_", 8, 1.0, "--arch is 'resnet50_'.*'resnet50'"),
        ("vgg11", 8, 1.0, "--size 8: .*vgg11"),
        ("deephebb", 4, 1.0, "--size 4: .*deephebb"),
        ("deephebb", 8, 1e16, r"--width 1e\+16 --size 8: .*deephebb"),
        ("vit_b_16", 30, 1.0, "--size 30: .*vit_b_16"),
        ("vgg11", 32, 0.5, "--width 0.5: expected 1.0"),
    ],
)
def test_bad_networks_are_named(name, size, width, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, 3, 10, size, width)
