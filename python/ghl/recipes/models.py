"""The networks by name: the authors' two, the CIFAR residual networks, torchvision's classifiers.

An architecture states the smallest image it takes and the channels it is fixed to, and the
transforms of `data.py` bring images there; how a network learns is not decided here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn

from ghl.recipes.errors import check_choice
from ghl.recipes.hebbnets import DeepHebb, DeepHebbImageNet, FastHebb, FastHebbImageNet
from ghl.recipes.resnet import CifarResNet

CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)


@dataclass(frozen=True)
class Architecture:
    """How to build a network, and the images it wants (`channels` None: those of the data)."""

    build: Callable[[int, int, int, float], nn.Module]
    smallest: int
    channels: int | None = None


def _cifar_resnet(depth: int, channels: int, classes: int, size: int, width: float) -> nn.Module:
    return CifarResNet(depth, channels, classes, width)


def _torchvision(name: str, channels: int, classes: int, size: int, width: float) -> nn.Module:
    if width != 1.0:
        raise ValueError(
            f"--width {width!r}: expected 1.0, torchvision's {name} has no narrow form"
        )
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary classifiers would make the training output a tuple.
        options = {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        options = {"image_size": size}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **options)


OWN: dict[str, Architecture] = {
    "deephebb": Architecture(DeepHebb, smallest=8),
    "fasthebb": Architecture(FastHebb, smallest=24),
    "deephebb-imagenet": Architecture(DeepHebbImageNet, smallest=64),
    "fasthebb-imagenet": Architecture(FastHebbImageNet, smallest=64),
    **{
        f"resnet{depth}": Architecture(partial(_cifar_resnet, depth), smallest=8)
        for depth in CIFAR_DEPTHS
    },
}
TORCHVISION_SMALLEST = {"alexnet": 64, "inception_v3": 96, "maxvit_t": 224}


def architectures() -> list[str]:
    """Every name that `--arch` takes; torchvision's are its classification models."""
    return [*OWN, *torchvision.models.list_models(module=torchvision.models)]


def architecture(name: str) -> Architecture:
    """The architecture of that name; ValueError with the nearest name if there is none."""
    check_choice("arch", name, architectures())
    if name in OWN:
        return OWN[name]
    return Architecture(partial(_torchvision, name), TORCHVISION_SMALLEST.get(name, 32), channels=3)


def build(name: str, channels: int, classes: int, size: int, width: float) -> nn.Module:
    """A freshly drawn network for (N, channels, size, size) images.

    ValueError when images of that size do not pass through it, or it does not fit into memory.
    """
    wanted = architecture(name)
    if name in OWN and size < wanted.smallest:
        raise ValueError(f"--size {size}: expected at least {wanted.smallest} for --arch {name}")
    option = "--size" if width == 1 else f"--width {width:g} --size"
    try:
        model = wanted.build(channels, classes, size, width)
    except (RuntimeError, AssertionError) as error:
        raise _refused(option, size, name, error) from error
    check_takes(model, name, channels, size, option)
    return model


def check_takes(model: nn.Module, name: str, channels: int, size: int, option: str) -> None:
    """Raise a ValueError that names the option unless images of that size pass through."""
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, size, size, device=device))
    except (RuntimeError, AssertionError) as error:
        raise _refused(option, size, name, error) from error
    model.train()


def _refused(option: str, size: int, name: str, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0]
    return ValueError(
        f"{option} {size}: expected a size of images that --arch {name} takes ({reason})"
    )
