"""The layers read off models: how many, how large, and the least that they cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ghl.bench.layers import Layer, layers_met, layers_of, parse, unique
from ghl.cli import WORKLOADS


def test_resnet50_has_its_convolutions() -> None:
    layers = layers_of("resnet50_b256")
    assert sum(layer.count for layer in layers) == 53
    assert sum(layer.count * layer.weights for layer in layers) == 23_454_912
    assert len(layers) == 23


def test_the_floor_of_resnet50_is_the_computed_one() -> None:
    """6.4 ms at an H200's 788 TFLOP/s and 4.3 TB/s: shared/performance.md, by hand."""
    floor = sum(
        layer.count * max(layer.flops / 788e12, layer.bytes(2) / 4.3e12)
        for layer in layers_of("resnet50_b256")
    )
    assert floor * 1e3 == pytest.approx(6.42, rel=0.01)


def test_deephebb_has_its_temperatures() -> None:
    layers = layers_of("deephebb_b64")
    assert [layer.tau for layer in layers] == [1.0, 1 / 0.65, 4.0]
    assert [layer.rows for layer in layers] == [65536, 16384, 4096]


def test_a_transformer_has_the_projections_of_its_attention() -> None:
    shapes = {(x.in_channels, x.out_channels): x.count for x in layers_of("vit_b16_b256")}
    assert shapes == {(768, 2304): 12, (768, 768): 12, (768, 3072): 12, (3072, 768): 12,
                      (768, 1000): 1}  # fmt: skip


def test_every_default_workload_is_known() -> None:
    assert all(parse(workload)[1] > 0 for workload in WORKLOADS)


@pytest.mark.parametrize("name", ["resnet50", "resnet50_b", "resnet50_b0", "_b4"])
def test_a_workload_names_its_batch(name: str) -> None:
    with pytest.raises(ValueError, match="must be MODEL_bBATCH"):
        parse(name)


def test_an_unknown_model_is_named() -> None:
    message = "the model of workload 'resnet5o_b4' is 'resnet5o', must be one of .* known names"
    with pytest.raises(ValueError, match=message):
        layers_of("resnet5o_b4")


def test_layers_of_the_same_sizes_are_one() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 8, 1, 2))
    met = layers_met(model, torch.empty(2, 4, 9, 7, device="cpu"), {})
    first, second = unique(met)
    assert (first.name, first.count, second.name, second.count) == ("0", 2, "2", 1)
    assert second.out_size == (5, 4)
    # a stride of 2 leaves three quarters of x unread
    assert second.bytes(2) == 2 * (2 * 20 * 4 + 2 * 40 * 8 + 2 * 32)


@pytest.mark.parametrize(
    "layer",
    [
        Layer("conv", 2, 6, 8, (9, 7), (3, 3), (2, 2), (1, 1), groups=2),
        Layer("linear", 5, 6, 8, linear=True),
    ],
    ids=lambda layer: layer.name,
)
def test_tensors_are_as_their_shapes_say(layer: Layer) -> None:
    tensors = layer.tensors(torch.float32, torch.device("cpu"))
    empty = layer.without_data(torch.float32)
    assert [t.shape for t in tensors] == [t.shape for t in empty]
    problem = layer.problem(*tensors)
    assert problem == layer.problem(*empty)
    assert (problem.rows, problem.columns) == (layer.rows, layer.columns)
