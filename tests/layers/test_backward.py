"""One update per backward: when it is made, who sees it, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghl


def model_and_input():
    torch.manual_seed(0)
    model = nn.Sequential(ghl.Linear(5, 6), nn.Tanh(), ghl.Linear(6, 4))
    return model, torch.randn(7, 5)


def loss_of(model, x):
    return model(x).square().sum()


def updates(model):
    return [model[i].weight.grad for i in (0, 2)]


def fresh_updates(model, x):
    """The updates of one backward, with nothing before it."""
    model.zero_grad()
    loss_of(model, x).backward()
    given = [u.clone() for u in updates(model)]
    model.zero_grad()
    return given


def assert_all_equal(given, expected):
    for a, b in zip(given, expected, strict=True):
        assert torch.equal(a, b)


def test_second_backward_before_zero_grad_is_an_error():
    """Updates must not be added; after zero_grad all is as in the first backward."""
    model, x = model_and_input()
    expected = fresh_updates(model, x)
    loss_of(model, x).backward()
    with pytest.raises(RuntimeError, match=r"already held an update.*zero_grad"):
        loss_of(model, x).backward()
    model.zero_grad()
    loss_of(model, x).backward()
    assert_all_equal(updates(model), expected)


def test_zero_grad_that_keeps_the_tensors_is_an_error():
    """Zeros in place of an update cannot be told from one; the message says what to do."""
    model, x = model_and_input()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model, x).backward()
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="set_to_none=True"):
        loss_of(model, x).backward()


def test_gradient_set_before_the_first_backward():
    """What a user put into weight.grad is part of the ordinary gradient, as always."""
    torch.manual_seed(1)
    layer, x = ghl.Linear(5, 4, rule="sign"), torch.randn(7, 5)
    layer.weight.grad = torch.full_like(layer.weight, -1e6)
    layer(x).square().sum().backward()
    assert layer.weight.grad.eq(-1).all()


@pytest.mark.parametrize("by", ["swap", "rule"])
def test_gradient_of_before_the_rule_is_not_merged(by):
    """It has no H0; zeros are none."""
    torch.manual_seed(2)
    layer = nn.Linear(5, 4) if by == "swap" else ghl.Linear(5, 4, rule="bp")
    net, x = nn.Sequential(layer), torch.randn(7, 5)
    net(x).square().sum().backward()
    if by == "swap":
        ghl.swap(net, types=nn.Linear)
    else:
        layer.rule = "ghl"
    with pytest.raises(
        RuntimeError, match="a gradient of before its rule or of a failed backward, when"
    ):
        net(x).square().sum().backward()
    net.zero_grad(set_to_none=False)
    net(x).square().sum().backward()
    assert layer.weight.grad.abs().max() == 1


def test_a_weight_frozen_since_the_forward_has_no_gradient():
    layer = ghl.Linear(4, 3)
    loss = layer(torch.randn(5, 4)).square().sum()
    layer.weight.requires_grad_(False)
    loss.backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    layer.weight.requires_grad_(True)
    layer(torch.randn(5, 4)).square().sum().backward()
    assert layer.weight.grad.abs().max() == 1


def test_a_weight_frozen_since_the_forward_keeps_its_update():
    """As a discriminator's, which its own loss has made, while the generator's goes through it."""
    layer = ghl.Linear(4, 3)
    layer(torch.randn(5, 4)).square().sum().backward()
    update = layer.weight.grad.clone()
    x = torch.randn(5, 4, requires_grad=True)
    loss = layer(x).square().sum()
    layer.requires_grad_(False)
    loss.backward()
    assert torch.equal(layer.weight.grad, update) and x.grad is not None


def test_retained_graph():
    """The same graph twice gives the same update twice."""
    model, x = model_and_input()
    loss = loss_of(model, x)
    loss.backward(retain_graph=True)
    first = [u.clone() for u in updates(model)]
    model.zero_grad()
    loss.backward()
    assert_all_equal(updates(model), first)


def test_sums_of_a_backward_that_raised_are_dropped():
    """A hook that throws midway leaves sums behind; the next step must not have them."""
    model, x = model_and_input()
    expected = fresh_updates(model, x)
    failing = [True]

    def throw(gradient):
        if failing[0]:
            raise KeyError("thrown midway")

    def run():
        hidden = model[0](x)
        hidden.register_hook(throw)
        return model[2](model[1](hidden)).square().sum()

    with pytest.raises(KeyError, match="midway"):
        run().backward()
    failing[0] = False
    model.zero_grad()
    run().backward()
    assert_all_equal(updates(model), expected)


def test_sums_without_a_gradient_are_dropped():
    """A use whose weight gradient never came (its hook threw) does not add to the next."""
    torch.manual_seed(2)
    layer, x = ghl.Linear(5, 4), torch.randn(7, 5)
    layer(x).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None

    def throw(gradient):
        raise KeyError("thrown between the sums")

    handle = layer.weight.register_hook(throw)
    with pytest.raises(KeyError):
        layer(10 * torch.randn(7, 5)).square().sum().backward()
    handle.remove()
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("inputs", ["weight", "parameters"])
def test_backward_of_chosen_inputs_is_an_error(inputs):
    """backward(inputs=) skips the sums; the ordinary gradient must not pass for an update."""
    model, x = model_and_input()
    chosen = [model[0].weight] if inputs == "weight" else list(model.parameters())
    with pytest.raises(RuntimeError, match=r"call backward\(\) without inputs="):
        loss_of(model, x).backward(inputs=chosen)
    expected = fresh_updates(model, x)
    loss_of(model, x).backward()
    assert_all_equal(updates(model), expected)


def test_weight_used_without_its_layer_is_an_error():
    """A gradient that no layer's backward accompanied has no update."""
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(5, 4)), torch.randn(7, 5)
    ghl.swap(model, types=nn.Linear)
    named = r"weight.grad of '0' \(4, 5\) holds .* use the weight through its layer"
    with pytest.raises(RuntimeError, match=named):
        F.linear(x, model[0].weight).square().sum().backward()


def test_penalty_on_the_weight_joins_its_gradient():
    """A loss term of the weight itself is part of the gradient that gates."""
    torch.manual_seed(4)
    layer, x = ghl.Linear(5, 4, rule="sign"), torch.randn(7, 5)
    (layer(x).square().sum() + 1e6 * layer.weight.sum()).backward()
    assert layer.weight.grad.eq(1).all()


def test_weight_that_is_not_a_leaf_is_an_error():
    """Parametrizations and functional_call have no place where an update could go."""
    torch.manual_seed(5)
    layer, x = ghl.Linear(5, 4), torch.randn(7, 5)
    doubled = {"weight": layer.weight * 2, "bias": layer.bias}
    with pytest.raises(RuntimeError, match=r"must be a leaf.*rule='bp'"):
        torch.func.functional_call(layer, doubled, (x,))
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(RuntimeError, match=r"weight of ParametrizedLinear .* must be a leaf"):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.double().load_state_dict(layer.state_dict())
    layer.rule = "bp"
    layer(x.double()).sum().backward()


def test_functional_call_with_leaves():
    """Leaves in place of the parameters get the update; the parameters do so afterwards."""
    torch.manual_seed(6)
    layer, x = ghl.Linear(5, 4), torch.randn(7, 5)
    leaves = {k: p.detach().clone().requires_grad_() for k, p in layer.named_parameters()}
    torch.func.functional_call(layer, leaves, (x,)).square().sum().backward()
    assert layer.weight.grad is None
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, leaves["weight"].grad)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("first", [True, False])
def test_users_hook_on_the_weight_sees_the_update(when, first):
    """In a first layer (no ∂L/∂x) and behind others, whether registered before ours or after."""
    torch.manual_seed(7)
    plain, seen = nn.Conv2d(3, 4, 3), []

    def watch(weight):
        seen.append(weight.grad)

    if when == "before":
        plain.weight.register_post_accumulate_grad_hook(watch)
    model = nn.Sequential(plain)
    ghl.swap(model)
    if when == "after":
        plain.weight.register_post_accumulate_grad_hook(watch)
    model.to(memory_format=torch.channels_last)
    model(torch.randn(2, 3, 6, 6, requires_grad=not first)).square().sum().backward()
    assert len(seen) == 1
    assert seen[0] is plain.weight.grad
    assert seen[0].abs().max() == 1


def test_optimizer_inside_backward():
    """The recipe of PyTorch's tutorial: step and free every gradient as it comes."""
    model, x = model_and_input()
    weights = [model[i].weight for i in (0, 2)]
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    expected = []
    for _ in range(2):
        expected.append(
            [w.add(u, alpha=-0.1) for w, u in zip(weights, fresh_updates(model, x), strict=True)]
        )
        loss_of(model, x).backward()
        for optimizer in optimizers.values():
            optimizer.step()

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    model, x = model_and_input()
    weights = [model[i].weight for i in (0, 2)]
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for after in expected:
        loss_of(model, x).backward()
        assert updates(model) == [None, None]
        assert_all_equal(weights, after)


def test_ranks_that_would_merge_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaging what each rank merged is wrong; nothing may do it silently."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    layer = ghl.Linear(3, 4)
    with pytest.raises(RuntimeError, match="process group of 2 ranks"):
        layer(torch.randn(5, 3)).sum().backward()
    layer.rule = "bp"
    layer.zero_grad()
    layer(torch.randn(5, 3)).sum().backward()
    assert layer.weight.grad is not None


def test_a_second_backward_with_create_graph_is_refused() -> None:
    """There autograd adds out of place, so that the update cannot be known by its tensor."""
    layer = ghl.Linear(3, 4)
    layer(torch.randn(5, 3)).square().sum().backward(create_graph=True)
    with pytest.raises(RuntimeError, match="already held an update"):
        layer(torch.randn(5, 3)).square().sum().backward(create_graph=True)


def test_weights_used_without_their_layers_are_named_together():
    """As by an attention that reads its projections' weights: once for all, not one a backward."""
    model = nn.ModuleDict({name: ghl.Linear(3, 3, bias=False) for name in "qkv"})
    swapped = ghl.swap(model, types=nn.Linear).swapped
    x = torch.randn(4, 3)
    y = model["v"](x) + x @ model["q"].weight.T + x @ model["k"].weight.T
    with pytest.raises(RuntimeError, match=r"weight\.grad of 'q' \(3, 3\), 'k' \(3, 3\) holds an"):
        y.sum().backward()
    model.zero_grad()
    sum(model[name](x).sum() for name in swapped).backward()
    assert all(layer.weight.grad.abs().max() == 1 for layer in model.values())


def test_other_hooks_within_a_backward_see_updates():
    """An optimizer that walks over all weights from a bias's hook, say: no ordinary gradient."""
    model, x = model_and_input()
    expected = fresh_updates(model, x)
    seen = []

    def look(bias):
        if model[2].weight.grad is not None:
            seen.append(model[2].weight.grad.clone())

    model[0].bias.register_post_accumulate_grad_hook(look)
    loss_of(model, x).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], expected[1])


def test_an_optimizer_after_a_backward_that_raised_has_updates():
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ValueError("on its way back")

    model, x = model_and_input()
    with pytest.raises(ValueError, match="on its way back"):
        model[2](Raises.apply(model[1](model[0](x)))).square().sum().backward()
    assert model[2].weight.grad.abs().max() == 1


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}])
def test_ddp_of_one_rank(options, tmp_path):
    """It writes buckets back into gradients at the end of a backward."""
    model, x = model_and_input()
    expected = fresh_updates(model, x)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        for _ in range(3):
            model.zero_grad()
            loss_of(wrapped, x).backward()
            assert_all_equal(updates(model), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_autograd():
    model, x = model_and_input()
    expected = fresh_updates(model, x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss_of(model, x).backward()
    assert_all_equal(updates(model), expected)


def test_compiled_autograd_after_an_operation_in_place():
    """Traced, versions tell nothing of what has overwritten an output."""
    torch.manual_seed(4)
    layers = [ghl.Conv2d(3, 4, 3), nn.ReLU(inplace=True), ghl.Conv2d(4, 2, 3)]
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 7, 7)
    model(x).square().sum().backward()
    expected = [layer.weight.grad for layer in (model[0], model[2])]
    model.zero_grad()
    loss = model(x).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    assert_all_equal([layer.weight.grad for layer in (model[0], model[2])], expected)


def test_totals_travel_only_where_a_rule_needs_them():
    for rule in ("ghl", ghl.Rule(normalize="mean"), ghl.Rule(decay="instar")):
        layer = ghl.Linear(3, 2, rule=rule)
        needed = layer.rule.decay == "instar" or layer.rule.normalize == "mean"
        assert (layer._sums.totals is not None) == needed
