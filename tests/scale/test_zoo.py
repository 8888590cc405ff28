"""Published networks, swapped and compiled: no graph breaks, one graph for every batch size."""

import pytest
import timm
import torch
import torch._dynamo
import torchvision
from torch import nn
from torch._dynamo.utils import counters

import ghl
from ghl_kernels import Problem

SIZE = 32
NETS = {
    "resnet50": lambda: torchvision.models.resnet50(num_classes=5),
    "vgg16": lambda: torchvision.models.vgg16(num_classes=5, init_weights=False),
    "vit_b_16": lambda: torchvision.models.vit_b_16(num_classes=5, image_size=SIZE),
    "convnext_atto": lambda: timm.create_model("convnext_atto", num_classes=5),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0", num_classes=5),
    "regnetx_002": lambda: timm.create_model("regnetx_002", num_classes=5),
}
LINEAR_TOO = ("vit_b_16", "convnext_atto")


def copied_gradients(monkeypatch):
    """A list that grows by every g of a convolution that does not reach a kernel in channels_last
    order."""
    copied = []
    of_conv2d = Problem.of_conv2d

    def spy(x, y, g, w, *rest):
        if not g.is_contiguous(memory_format=torch.channels_last):
            copied.append(g.shape)
        return of_conv2d(x, y, g, w, *rest)

    monkeypatch.setattr(Problem, "of_conv2d", spy)
    return copied


@pytest.mark.parametrize("name", NETS)
def test_compiled(name, monkeypatch):
    """Forward and backward of two batch sizes; channels_last from the image to its gradient.

    The batch is symbolic from the first, which raises where anything depends on its size: what
    torch.compile comes to after one recompilation.
    """
    torch._dynamo.reset()
    counters.clear()
    model = NETS[name]().to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        if not parameter.any():  # a head or a residual that starts at zero lets no gradient pass
            nn.init.normal_(parameter, std=0.1)
    types = (nn.Conv2d, nn.Linear) if name in LINEAR_TOO else (nn.Conv2d,)
    report = ghl.swap(model, types=types)
    copied = copied_gradients(monkeypatch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (3, 2):
        x = torch.randn(batch, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
        torch._dynamo.mark_dynamic(x, 0)
        model.zero_grad()
        compiled(x.requires_grad_()).square().sum().backward()
        for layer in report.swapped:
            weight = model.get_submodule(layer).weight
            assert weight.grad.stride() == weight.stride(), layer
            assert 0 < weight.grad.abs().max() <= 1, layer
        assert x.grad.is_contiguous(memory_format=torch.channels_last)
        compiled_copies, _ = len(copied), copied.clear()
        model.zero_grad()
        model(x.detach()).square().sum().backward()
        assert compiled_copies <= len(copied), "of gradients in another order than eager mode's"
        copied.clear()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()
