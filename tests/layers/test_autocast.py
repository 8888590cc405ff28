"""Low precision: autocast, and models that are bfloat16 or float16 throughout."""

import copy

import pytest
import torch
from torch import nn

import ghl
from ghl_kernels import Rule

from .oracle import assert_like_reference, assert_update, record


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    return model.to(dtype)


def image(dtype=torch.float32):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(model, x, dtype=torch.bfloat16, enabled=True):
    with torch.autocast("cpu", dtype, enabled=enabled):
        y = model(x)
    return y.float().square().sum()


def rounded_loss(model):
    return loss_of(model, image())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["ghl", "hebb"])
def test_autocast(dtype, preset):
    """float32 updates of low-precision x, y and g, with the weight as the forward rounded it."""
    plain, rule = net(), Rule.preset(preset).replace(tau=0.5)

    def run(model):
        return loss_of(model, image(), dtype)

    calls = record(plain, run)
    model = copy.deepcopy(plain)
    ghl.swap(model, rule, types=(nn.Conv2d, nn.Linear))
    loss = run(model)
    assert torch.equal(loss, run(plain))
    loss.backward()
    for name, (call,) in calls.items():
        call.x = call.x.to(dtype)
        assert call.y.dtype == dtype
        weight = model.get_submodule(name).weight
        assert weight.grad.dtype == torch.float32
        assert_update(weight, [call], rule, used=weight.to(dtype), rounding=2e-6)


def test_autocast_of_a_shared_layer():
    """Two uses under autocast are summed in float32 before the merge."""
    torch.manual_seed(2)
    shared, x = nn.Linear(6, 6), torch.randn(7, 6)
    plain = nn.Sequential(shared, nn.Tanh(), shared)
    calls = record(plain, lambda m: loss_of(m, x))["0"]
    for call in calls:
        call.x = call.x.bfloat16()
    model = copy.deepcopy(plain)
    ghl.swap(model, types=nn.Linear)
    loss_of(model, x).backward()
    weight = model[0].weight
    assert_update(weight, calls, Rule(), used=weight.bfloat16(), rounding=2e-6)


def test_uses_of_a_weight_keep_one_copy_of_it_at_most():
    """Each has the Parameter; what autocast computes with is for the forward."""
    layer, kept = ghl.Linear(32, 32, bias=False), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = torch.randn(2, 32)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(8):
                x = layer(x)
    large = [t for t in kept.values() if t.numel() >= layer.weight.numel()]
    assert [t.dtype for t in large] == [torch.float32]


def test_autocast_switched_between_steps():
    """The weight is rounded in the steps under autocast and only in those."""
    model, updates = net(), []
    ghl.swap(model, types=(nn.Conv2d, nn.Linear))
    for enabled in (False, True, False, True):
        model.zero_grad()
        loss_of(model, image(), enabled=enabled).backward()
        updates.append([model[i].weight.grad for i in (0, 3)])
    for layer in range(2):
        assert torch.equal(updates[0][layer], updates[2][layer])
        assert torch.equal(updates[1][layer], updates[3][layer])
        assert not torch.equal(updates[0][layer], updates[1][layer])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
def test_backward_inside_autocast(kind, forward, dtype):
    """Calling backward() inside the region changes nothing, also of a float32 forward, and where
    an in-place ReLU has overwritten y."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4) if kind is nn.Linear else nn.Conv2d(3, 8, 3)
    model, updates = nn.Sequential(layer, nn.ReLU(inplace=True)), []
    ghl.swap(model, ghl.Rule(gate="hebb", normalize="none"), types=kind)
    x = torch.randn(9, 5) if kind is nn.Linear else image()
    for inside in (False, True):
        model.zero_grad()
        loss = loss_of(model, x, dtype, forward) * 1e-9
        with torch.autocast("cpu", dtype, enabled=inside):
            loss.backward()
        updates.append([p.grad for p in model.parameters()])
    for a, b in zip(*updates, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_one_low_precision_under_autocast_of_another(dtype, synchronized):
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    plain, rule = net(dtype), Rule(gate="hebb", normalize="none")

    def run(model):
        return loss_of(model, image(), other)

    calls = record(plain, run)
    model = copy.deepcopy(plain)
    ghl.swap(model, rule, types=(nn.Conv2d, nn.Linear))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    if synchronized:
        ghl.synchronize(model, optimizer)
    run(model).backward()
    optimizer.step()
    for name, (call,) in calls.items():
        call.x = call.x.to(other)
        weight = model.get_submodule(name).weight
        assert_update(weight, [call], rule, used=weight.to(other), rounding=2**-7)


@pytest.mark.parametrize("preset", ["ghl", "hebb", "sign", "bp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_one_dtype(dtype, preset):
    """The update has the weight's dtype; sums are wider than it, their rounding is not."""

    def run(model):
        return model(image(dtype)).float().square().mean()

    model = assert_like_reference(net(dtype), run, preset)
    assert model[0].weight.grad.dtype == dtype


def test_a_graph_of_gradients_made_inside_autocast():
    """Of a float32 forward: its G is float32 as well."""
    layer, x, updates = ghl.Linear(5, 4), torch.randn(9, 5), []
    for inside in (False, True):
        loss = layer(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            updates += torch.autograd.grad(loss, layer.weight, create_graph=True)
    assert torch.equal(*updates)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_tensors_without_data_with_an_output_changed_in_place(kind):
    layer = nn.Linear(5, 4) if kind is nn.Linear else nn.Conv2d(3, 4, 3)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    ghl.swap(model, types=kind)
    model.to("meta")
    shape = (9, 5) if kind is nn.Linear else (2, 3, 8, 8)
    model(torch.randn(shape, device="meta")).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape


@pytest.mark.parametrize("synchronized", [False, True])
def test_a_weight_with_gaps_in_the_order_of_channels_last(synchronized):
    """Rounded it has none, and another memory order than its sums."""
    updates = []
    for gaps in (False, True):
        torch.manual_seed(0)
        layer, x = ghl.Conv2d(4, 5, 3), torch.randn(2, 4, 6, 6)
        weight = torch.randn(5, 7, 3, 3).to(memory_format=torch.channels_last)[:, :4]
        layer.weight = torch.nn.Parameter(weight if gaps else weight.contiguous())
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        if synchronized:
            ghl.synchronize(layer, optimizer)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        optimizer.step()
        updates.append(layer.weight.grad)
    torch.testing.assert_close(*updates, check_stride=False)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_a_graph_of_gradients_reaches_the_input(kind):
    """Through the cast that autocast makes of it."""
    torch.manual_seed(3)
    layer = nn.Linear(6, 4) if kind is nn.Linear else nn.Conv2d(2, 4, 3)
    swapped = copy.deepcopy(layer)
    ghl.swap(swapped, types=kind)
    shape, found = (8, 6) if kind is nn.Linear else (3, 2, 5, 5), []
    for one in (layer, swapped):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = one(x)
        (G,) = torch.autograd.grad(y.float().sin().sum(), one.weight, create_graph=True)
        found.append(torch.autograd.grad(G.square().sum(), x)[0].flatten())
    assert torch.cosine_similarity(*found, dim=0) > 0.999
