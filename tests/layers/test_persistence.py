"""Copies, files, conversions: a layer works on, with its rule, and shares nothing by accident."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import ghl
from ghl_kernels import Rule

RULE = Rule(tau=0.5, normalize="mean")


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        ghl.Conv2d(2, 4, 3, rule=RULE, dtype=dtype), nn.Flatten(),
        ghl.Linear(4 * 16, 3, rule=RULE, dtype=dtype),
    )  # fmt: skip


def image(dtype=torch.float32):
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def updates(model, dtype=torch.float32):
    model.zero_grad()
    model(image(dtype)).square().sum().backward()
    return [model[i].weight.grad for i in (0, 2)]


def assert_same_updates(model, other):
    for a, b in zip(updates(model), updates(other), strict=True):
        assert torch.equal(a, b)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "deepcopy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("used", [False, True])
def test_copy_is_complete_and_separate(copied, used):
    """A copy has the rule and its own sums; training it does not touch the original."""
    model = net()
    if used:
        updates(model)
    other = COPIES[copied](model)
    assert other[0].rule == RULE
    assert type(other[0]) is ghl.Conv2d
    assert other[0]._sums is not model[0]._sums
    model.zero_grad()
    first = updates(other)
    assert model[0].weight.grad is None
    for a, b in zip(updates(model), first, strict=True):
        assert torch.equal(a, b)
    other[0].rule = "sign"
    assert model[0].rule == RULE


class Twice(nn.Module):
    def forward(self, b):
        return 2 * b


@pytest.mark.parametrize("compiled", [False, True])
def test_copy_of_a_layer_with_a_parametrized_bias(compiled):
    """It is copied by torch's class, with all that a layer has."""
    model, x = nn.Sequential(ghl.Linear(4, 3)), torch.randn(5, 4)
    nn.utils.parametrize.register_parametrization(model[0], "bias", Twice())
    twin, found = copy.deepcopy(model), []
    for one in (model, twin):
        run = torch.compile(one, backend="aot_eager") if compiled else one
        run(x).square().sum().backward()
        found.append(one[0].weight.grad)
    assert torch.equal(*found) and found[0].abs().max() == 1


@pytest.fixture
def exchanged_in_place():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_conversion_that_exchanges_tensors_in_place(exchanged_in_place):
    """torch exchanges nothing that has weak references, and leaves hooks behind."""
    model, made = net(), net().double()  # which differ by rounding alone
    updates(model)
    model.double().load_state_dict(made.state_dict())
    for one in (model, made):
        found = updates(one, torch.float64)
        torch.__future__.set_swap_module_params_on_conversion(False)
        expected = net(torch.float64)
        expected.load_state_dict(one.state_dict())
        torch.__future__.set_swap_module_params_on_conversion(True)
        for a, b in zip(found, updates(expected, torch.float64), strict=True):
            assert torch.equal(a, b)
    model.zero_grad()
    ghl.unswap(model)
    model.float()
    ghl.swap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = ghl.synchronize(model, optimizer)
    with pytest.raises(RuntimeError, match=r"converted in place.*: call remove\(\)"):
        model.double()
    handle.remove()
    model.double()


@pytest.mark.parametrize("copied", COPIES)
def test_tied_weights_stay_tied(copied):
    """Copies of layers with one weight share one weight and its sums."""
    torch.manual_seed(2)
    model = nn.Sequential(ghl.Linear(4, 4), nn.Tanh(), ghl.Linear(4, 4))
    model[2].weight = model[0].weight
    other = COPIES[copied](model)
    x, grads = torch.randn(5, 4), []
    for m in (model, other):
        m(x).square().sum().backward()
        grads.append(m[0].weight.grad)
    assert other[2].weight is other[0].weight
    assert torch.equal(*grads)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_is_that_of_the_plain_model(assign):
    """Keys and values are nn's, both ways; assign=True replaces the Parameters themselves."""
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    model, reference = net(), net()
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    assert list(state) == list(model.state_dict())
    reference.load_state_dict(state)
    before = model[0].weight
    model.load_state_dict(state, assign=assign)
    assert (model[0].weight is before) != assign
    assert_same_updates(model, reference)
    plain.load_state_dict(model.state_dict())


def test_weight_replaced_by_hand():
    """A new Parameter gets the update, the old one is an ordinary one again."""
    model, other = net(), net()
    old, new = model[0].weight, nn.Parameter(other[0].weight.detach().clone())
    model[0].weight = new
    assert_same_updates(model, other)
    (old * 2).sum().backward()
    assert old.grad.eq(2).all()


def test_weight_of_another_shape():
    """As Hugging Face's resize_token_embeddings gives a tied head."""
    layer, wanted = ghl.Linear(4, 5, bias=False), ghl.Linear(4, 7, bias=False)
    layer(torch.randn(3, 4)).sum().backward()
    layer.zero_grad()
    layer.weight.data = wanted.weight.data.clone()
    x = torch.randn(3, 4)
    for one in (layer, wanted):
        one(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, wanted.weight.grad)


def test_weight_of_another_dtype():
    """By .data, of which no layer hears: H0 is summed as the new weight's is."""
    torch.manual_seed(5)
    layer, wanted = ghl.Linear(4, 5, bias=False), ghl.Linear(4, 5, bias=False).double()
    layer(torch.randn(3, 4)).sum().backward()
    layer.zero_grad()
    layer.weight.data = wanted.weight.data.clone()
    x = torch.randn(3, 4, dtype=torch.float64)
    for one in (layer, wanted):
        one(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, wanted.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conversion_to_another_dtype(dtype):
    """.to(dtype) gives the update of a model made in that dtype, and back again."""
    made, model = net(dtype), net()
    made.load_state_dict(model.state_dict())
    expected = updates(made, dtype)
    updates(model)
    model.to(dtype)
    for a, b in zip(updates(model, dtype), expected, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)
    model.float()
    assert updates(model)[0].dtype == torch.float32


@pytest.mark.parametrize("made", ["device context", "device argument", "to"])
def test_meta_device_and_to_empty(made):
    """A model without memory is given some, then a state, and trains."""
    if made == "device context":
        with torch.device("meta"):
            model = net()
    elif made == "to":
        model = net().to("meta")
    else:
        model = nn.Sequential(
            ghl.Conv2d(2, 4, 3, rule=RULE, device="meta"), nn.Flatten(),
            ghl.Linear(64, 3, rule=RULE, device="meta"),
        )  # fmt: skip
    model(torch.empty(5, 2, 6, 6, device="meta")).sum().backward()
    assert model[0].weight.grad.shape == model[0].weight.shape
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())
    assert_same_updates(model, net())


def test_meta_device_and_assigned_state():
    """load_state_dict(assign=True) is the other way from meta to memory."""
    with torch.device("meta"):
        model = net()
    model.load_state_dict(net().state_dict(), assign=True)
    assert_same_updates(model, net())


def test_swapped_model_is_saved_as_it_is():
    """A torchvision-style model swapped in place survives torch.save whole."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    ghl.swap(model, RULE, types=(nn.Conv2d, nn.Linear))
    assert_same_updates(model, saved_and_loaded(model))


def test_nothing_outlives_a_model():
    """Weights and sums are freed with their layer."""
    model = net()
    updates(model)
    watched = [weakref.ref(t) for m in (model[0], model[2]) for t in (m.weight, m._sums)]
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None] * 4
