"""The layers that are measured, read off models: shapes, how often each occurs, its least cost.

Models are run once on the meta device with hooks, so no shape is typed by hand and no number is
computed; timing is in `clock.py`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghl_kernels import Problem
from ghl_kernels.checks import output_size
from ghl_kernels.rule import check_choice

ALIASES = {"vit_b16": "vit_b_16"}
Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution and the batch it meets; `count` layers of a model are it.

    batch: images, or rows of a linear layer. size: of the image, padding excluded.
    """

    name: str
    batch: int
    in_channels: int
    out_channels: int
    size: Pair = (1, 1)
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    linear: bool = False
    tau: float = 1.0
    count: int = 1

    @property
    def out_size(self) -> Pair:
        geometry = self.stride, self.padding, self.dilation
        height, width = output_size(self.size, self.kernel_size, *geometry)
        return height, width

    @property
    def rows(self) -> int:
        return self.batch * math.prod(self.out_size)

    @property
    def columns(self) -> int:
        """Weights of a neuron."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def weights(self) -> int:
        return self.out_channels * self.columns

    @property
    def flops(self) -> int:
        """Two products of rows by neurons by inputs per row."""
        return 4 * self.rows * self.weights

    def bytes(self, itemsize: int) -> int:
        """x, y, g and w read once, the update written once; of x no more than patches touch."""
        x = self.batch * self.in_channels * math.prod(self.size)
        x = min(x, self.rows * self.in_channels * math.prod(self.kernel_size))
        return itemsize * (x + 2 * self.rows * self.out_channels + 2 * self.weights)

    @property
    def shape(self) -> str:
        """As a table prints it."""
        if self.linear:
            return f"{self.rows}x{self.in_channels}->{self.out_channels}"
        (h, w), (kh, kw) = self.size, self.kernel_size
        options = f"/{self.stride[0]}" if self.stride != (1, 1) else ""
        options += f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.batch}x{self.in_channels}x{h}x{w}->{self.out_channels} {kh}x{kw}{options}"

    def tensors(
        self, dtype: torch.dtype, device: torch.device, channels_last: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, y, g, w as in the first step of training: Kaiming weights, unit-variance input."""
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "dtype": dtype, "device": device}
        scale = (2 / self.columns) ** 0.5
        if self.linear:
            x = torch.randn(self.batch, self.in_channels, **options)
            w = torch.randn(self.out_channels, self.in_channels, **options) * scale
            y = x @ w.T
            return x, y, torch.randn(y.shape, **options), w
        order = torch.channels_last if channels_last else torch.contiguous_format
        shape = self.out_channels, self.in_channels // self.groups, *self.kernel_size
        x = torch.randn(self.batch, self.in_channels, *self.size, **options)
        w = torch.randn(shape, **options) * scale
        x, w = (t.contiguous(memory_format=order) for t in (x, w))
        y = F.conv2d(x, w, None, self.stride, self.padding, self.dilation, self.groups)
        y = y.contiguous(memory_format=order)
        g = torch.randn(y.shape, **options).contiguous(memory_format=order)
        return x, y, g, w

    def without_data(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tensors of these shapes on the meta device, channels_last where they can be."""
        if self.linear:
            shapes: tuple[tuple[int, ...], ...] = (
                (self.batch, self.in_channels), (self.batch, self.out_channels),
                (self.out_channels, self.in_channels),
            )  # fmt: skip
        else:
            shapes = (
                (self.batch, self.in_channels, *self.size),
                (self.batch, self.out_channels, *self.out_size),
                (self.out_channels, self.in_channels // self.groups, *self.kernel_size),
            )
        order = torch.contiguous_format if self.linear else torch.channels_last
        options: dict[str, Any] = {"dtype": dtype, "device": "meta", "memory_format": order}
        x, y, w = (torch.empty(shape, **options) for shape in shapes)
        return x, y, y, w

    def problem(
        self, x: Tensor, y: Tensor, g: Tensor, w: Tensor, competition: str = "softmax"
    ) -> Problem:
        """The layer as the dispatcher and implementations see it."""
        if self.linear:
            return Problem.of_linear(x, w, competition)
        geometry = self.stride, self.padding, self.dilation, self.groups
        return Problem.of_conv2d(x, y, g, w, *geometry, competition)


def of_convolution(name: str, module: nn.Conv2d, x: Tensor, tau: float) -> Layer:
    if isinstance(module.padding, str):
        raise ValueError(f"{name} has padding {module.padding!r}, must be numbers to be measured")
    pairs = (module.kernel_size, module.stride, module.padding, module.dilation)
    kernel_size, stride, padding, dilation = ((int(p[0]), int(p[1])) for p in pairs)
    return Layer(
        name, x.shape[0], module.in_channels, module.out_channels, (x.shape[2], x.shape[3]),
        kernel_size, stride, padding, dilation, module.groups, tau=tau,
    )  # fmt: skip


def of_linear(name: str, x: Tensor, out_features: int) -> Layer:
    features = x.shape[-1]
    return Layer(name, x.numel() // features, features, out_features, linear=True)


def layers_met(model: nn.Module, images: Tensor, tau: dict[str, float]) -> list[Layer]:
    """Every convolution and linear layer in the order of a forward pass of `images`."""
    met: list[Layer] = []

    def hook(name: str) -> object:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            x = inputs[0]
            if isinstance(module, nn.Conv2d):
                met.append(of_convolution(name, module, x, tau.get(name, 1.0)))
            elif isinstance(module, nn.MultiheadAttention):
                # its projections are weights, not modules that a hook would see
                met.append(of_linear(f"{name}.in_proj", x, 3 * module.embed_dim))
                met.append(of_linear(f"{name}.out_proj", x, module.embed_dim))
            elif isinstance(module, nn.Linear):
                met.append(of_linear(name, x, module.out_features))

        return record

    kinds = nn.Conv2d, nn.Linear, nn.MultiheadAttention
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(hook(name))  # type: ignore[arg-type]
    model.train()(images)
    return met


def unique(layers: list[Layer]) -> list[Layer]:
    """Layers of the same sizes once, under the name of the first, with their number."""
    first: dict[Layer, Layer] = {}
    for layer in layers:
        sizes = dataclasses.replace(layer, name="", count=1)
        seen = first.get(sizes)
        count = seen.count + 1 if seen else 1
        first[sizes] = dataclasses.replace(seen or layer, count=count)
    return list(first.values())


def parse(workload: str) -> tuple[str, int]:
    """The model and the batch of a name like resnet50_b256; ValueError for anything else."""
    model, _, batch = workload.rpartition("_b")
    if not model or not batch.isdigit() or int(batch) == 0:
        raise ValueError(f"workload is {workload!r}, must be MODEL_bBATCH, as resnet50_b256")
    return model, int(batch)


def layers_of(workload: str) -> list[Layer]:
    """The unique layers of a model and batch: its convolutions, or, if it has fewer than two, its
    linear layers. ValueError for an unknown model."""
    from ghl.recipes.config import PUBLISHED
    from ghl.recipes.models import OWN, architecture, architectures

    name, batch = parse(workload)
    check_choice(f"the model of workload {workload!r}", name, [*ALIASES, *architectures()])
    build = architecture(ALIASES.get(name, name)).build
    classes, side = (10, 32) if name in OWN else (1000, 224)
    tau = PUBLISHED.get(name, {}).get("tau")
    with torch.device("meta"):
        model = build(3, classes, side, 1.0)
        images = torch.empty(batch, 3, side, side)
        met = layers_met(model, images, tau if isinstance(tau, dict) else {})
    convolutions = [layer for layer in met if not layer.linear]
    return unique(convolutions if len(convolutions) > 1 else [x for x in met if x.linear])
