"""swap and unswap: what they change, what they leave alone, and what they say about it."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import ghl
from ghl_kernels import Rule

BOTH = (nn.Conv2d, nn.Linear)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        nn.Flatten(),
        nn.Linear(4 * 16, 5),
    )


def image():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def types_of(model):
    return {name: type(m) for name, m in model.named_modules()}


def test_report_lists_what_was_swapped_and_what_was_not():
    """The report has rules and reasons by name, and reads as a table."""
    model = small_net()
    report = ghl.swap(model, "hebb", tau={"0.*": 0.5}, types=BOTH, exclude=("0.2",))
    assert report.swapped == {"0.0": Rule(gate="hebb", tau=0.5), "2": Rule(gate="hebb")}
    assert report.skipped == {"0.2": "excluded"}
    header, *lines = repr(report).splitlines()
    assert header == "2 layers swapped, 1 left as they are"
    assert [line.split()[0] for line in lines] == ["0.0", "2", "0.2"]
    assert "tau=0.5" in lines[0]
    assert "excluded" in lines[2]
    assert type(model[0][0]) is ghl.Conv2d
    assert type(model[0][2]) is nn.Conv2d


def test_default_is_convolutions_only():
    """Fully connected layers stay with backpropagation, as published."""
    model = small_net()
    assert list(ghl.swap(model).swapped) == ["0.0", "0.2"]
    assert type(model[2]) is nn.Linear


def test_model_that_is_itself_a_layer():
    """A bare layer is swapped in place under the empty name."""
    layer = nn.Conv2d(3, 4, 3)
    assert list(ghl.swap(layer).swapped) == [""]
    assert type(layer) is ghl.Conv2d
    assert ghl.unswap(layer) == [""]


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (None, (1.0, 1.0)),
        (2, (2.0, 2.0)),
        ({"0.0": 0.3}, (0.3, 1.0)),
        ({"*.2": 0.3, "*": 4.0}, (4.0, 0.3)),
        ({"*": 4.0, "*.2": 0.3}, (4.0, 4.0)),
    ],
)
def test_tau_by_name_and_pattern(tau, expected):
    """The first pattern that matches a name gives its temperature."""
    report = ghl.swap(small_net(), tau=tau)
    assert tuple(rule.tau for rule in report.swapped.values()) == expected


@pytest.mark.parametrize("exclude", [("2",), ("0.0", "2"), "2", ("[2]",)])
def test_exclude_by_name_and_pattern(exclude):
    """Names and patterns; naming a layer that would not be swapped anyway is no error."""
    model = small_net()
    report = ghl.swap(model, types=BOTH, exclude=exclude)
    assert "2" not in report.swapped
    assert ghl.swap(small_net(), exclude=("2",)).skipped == {}


def test_exclude_by_a_module_that_holds_layers():
    """Excluding a block excludes what is in it."""
    report = ghl.swap(small_net(), types=BOTH, exclude=("0",))
    assert report.skipped == {"0.0": "excluded", "0.2": "excluded"}


def test_a_layer_by_any_of_its_names():
    """A module that is in a model twice has two."""
    twice = nn.Linear(4, 4)
    model = nn.ModuleDict({"encoder": nn.Sequential(twice), "decoder": nn.Sequential(twice)})
    report = ghl.swap(model, types=nn.Linear, tau={"decoder.0": 0.5})
    assert report.swapped == {"encoder.0": Rule(tau=0.5)}
    with pytest.raises(ValueError, match=r"nothing to swap: encoder\.0: excluded"):
        ghl.swap(model, types=nn.Linear, exclude=["decoder"])


def test_a_subclass_of_ours_gets_the_new_rule():
    class Scaled(ghl.Linear):
        pass

    model = nn.Sequential(Scaled(3, 4, rule="hebb"))
    for rule in ("bp", "ghl"):
        assert list(ghl.swap(model, rule, types=nn.Linear).swapped) == ["0"]
        assert type(model[0]) is Scaled
        assert model[0].rule == Rule.preset(rule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ("0.1O",)}, "exclude has '0.1O', which matches no module; the nearest is"),
        ({"tau": {"0.3": 1.0}}, "tau has '0.3', which matches no layer; the nearest is '0.[02]'"),
        ({"tau": 0.0}, "tau is 0"),
        ({"tau": {"0.0": float("nan")}}, "tau is nan"),
        ({"rule": "heb"}, "did you mean 'hebb'"),
        ({"types": (nn.Conv1d,)}, "types has .*Conv1d.*, must be of nn.Conv2d and nn.Linear"),
        ({"types": ()}, "types is empty"),
        ({"exclude": ("*",)}, "nothing to swap: 0.0: excluded"),
    ],
)
def test_errors_come_before_any_change(options, message):
    """One clear error, and the model is as it was."""
    model = small_net()
    before = types_of(model)
    with pytest.raises(ValueError, match=message):
        ghl.swap(model, **options)
    assert types_of(model) == before


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Sequential(nn.Linear(3, 3)), nn.ReLU()])
def test_nothing_to_swap_is_an_error(model):
    """An empty model, or one without a layer of the types."""
    with pytest.raises(ValueError, match=f"{type(model).__name__} without a Conv2d layer"):
        ghl.swap(model)


def test_subclasses_are_left_alone_with_the_reason():
    """timm's and torch's subclasses compute differently from their base, or are bypassed."""
    model = nn.Sequential(
        timm.layers.StdConv2d(3, 4, 3), timm.layers.Conv2dSame(4, 4, 3), nn.Conv2d(4, 4, 1)
    )
    report = ghl.swap(model)
    assert list(report.swapped) == ["2"]
    kind = "is a timm.layers.std_conv.StdConv2d, which may compute differently from its base"
    assert report.skipped["0"] == kind
    assert "Conv2dSame" in report.skipped["1"]

    attention = nn.TransformerEncoderLayer(8, 2, 16)
    report = ghl.swap(attention, types=nn.Linear)
    assert list(report.swapped) == ["linear1", "linear2"]
    assert "NonDynamicallyQuantizableLinear" in report.skipped["self_attn.out_proj"]


def test_layers_that_cannot_be_swapped_yet():
    """Lazy, parametrized, pruned and frozen layers are skipped, each with its reason."""
    model = nn.ModuleDict({"plain": nn.Linear(3, 3), "lazy": nn.LazyLinear(3)})
    model["new_norm"] = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model["old_norm"] = torch.nn.utils.spectral_norm(nn.Linear(3, 3))
    model["pruned"] = nn.Linear(3, 3)
    prune.l1_unstructured(model["pruned"], "weight", 2)
    model["frozen"] = nn.Linear(3, 3).requires_grad_(False)
    model["complex"] = nn.Linear(3, 3, dtype=torch.complex64)
    report = ghl.swap(model, types=nn.Linear)
    assert list(report.swapped) == ["plain"]
    assert report.skipped["lazy"] == "is not initialized yet"
    assert report.skipped["new_norm"].endswith(
        "ParametrizedLinear, which may compute differently from its base"
    )
    assert report.skipped["old_norm"] == "its weight is not a Parameter"
    assert report.skipped["pruned"] == "its weight is not a Parameter"
    assert report.skipped["frozen"] == "its weight is frozen"
    assert report.skipped["complex"] == "its weight is of torch.complex64"
    model["lazy"](torch.zeros(2, 3))
    nn.utils.parametrizations.weight_norm(model["plain"])
    assert list(ghl.swap(model, types=nn.Linear).swapped) == ["lazy"]


def test_layers_keep_everything_but_their_class():
    """The same modules, Parameters, keys, flags and hooks; hooks still run."""
    model, ran = small_net(), []
    model[0][0].register_forward_hook(lambda m, a, y: ran.append("forward"))
    model[0][0].register_forward_pre_hook(lambda m, a: ran.append("pre"))
    model[0][0].register_full_backward_hook(lambda m, gi, go: ran.append("backward"))
    model[0][2].eval()
    model[0][2].bias.requires_grad_(False)
    model[0][2].note = "mine"
    modules, parameters = list(model.modules()), list(model.parameters())
    keys, flags = list(model.state_dict()), [m.training for m in modules]
    ghl.swap(model, types=BOTH)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert [m.training for m in model.modules()] == flags
    assert model[0][2].note == "mine"
    model(image()).sum().backward()
    assert ran == ["pre", "forward", "backward"]
    assert model[0][2].bias.grad is None


def test_swap_twice_changes_the_rule():
    """The second swap's rule holds, for layers the first already swapped."""
    model = small_net()
    ghl.swap(model, "hebb", tau=0.5)
    ghl.swap(model, "sign")
    assert model[0][0].rule == Rule(gate="sign_only")
    model(image()).square().sum().backward()
    assert model[0][0].weight.grad.abs().eq(1).all()


def test_unswap_restores_everything():
    """Types, repr, pickled attributes and ordinary gradients, bit for bit."""
    model, plain = small_net(), small_net()
    attributes = [set(vars(m)) for m in model.modules()]
    ghl.swap(model, types=BOTH)
    assert repr(model) != repr(plain)
    model(image()).sum().backward()
    model.zero_grad()
    assert ghl.unswap(model) == ["0.0", "0.2", "2"]
    assert types_of(model) == types_of(plain)
    assert repr(model) == repr(plain)
    assert [set(vars(m)) for m in model.modules()] == attributes
    for m in (model, plain):
        m(image()).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
        assert not a._post_accumulate_grad_hooks
    assert ghl.unswap(model) == []


def test_torchvision_model_with_the_arguments_of_the_design():
    """rule, tau by name and exclude of the classifier on a stock ResNet."""
    model = torchvision.models.resnet18(num_classes=10)
    report = ghl.swap(model, rule="ghl", tau={"layer1.*": 0.5}, exclude=("fc", "conv1"))
    assert len(report.swapped) == 19
    assert report.skipped == {"conv1": "excluded"}
    assert report.swapped["layer1.0.conv1"].tau == 0.5
    assert report.swapped["layer2.0.conv1"].tau == 1.0


def test_arguments_of_a_wrong_type_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match=r"model is list, must be an nn\.Module"):
        ghl.swap([nn.Linear(3, 3)])
    with pytest.raises(TypeError, match=r"exclude has <class .*Linear'>, must have names or patt"):
        ghl.swap(small_net(), exclude=[nn.Linear])
    with pytest.raises(TypeError, match=r"tau is '0\.5', must be a number or"):
        ghl.swap(model, tau="0.5")
    with pytest.raises(TypeError, match="exclude is None, must be names or patterns"):
        ghl.swap(model, exclude=None)
    for types in (None, "Conv2d"):
        with pytest.raises(TypeError, match=rf"types is {types!r}, must be of nn\.Conv2d"):
            ghl.swap(model, types=types)
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(TypeError, match=r"model is NoneType, must be an nn\.Module"):
        ghl.unswap(None)


def test_unswap_of_parametrized_layers():
    """Their class is another one, that stays; the rule does not."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 4, 3))
    ghl.swap(model, types=(nn.Linear, nn.Conv2d))
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    nn.utils.parametrizations.weight_norm(model[1])
    assert ghl.unswap(model) == ["0", "1"]
    torch.optim.SGD(ghl.param_groups(model, lr=0.1), lr=0.1)  # of leaves
    (3 * model[0](torch.ones(1, 4))).sum().backward()
    assert model[0].weight.grad.eq(3).all()
    model[1](torch.ones(1, 1, 4, 4)).sum().backward()


def test_unswap_of_a_layer_whose_forward_was_wrapped():
    """As accelerate does; what it calls is our class's."""
    model = nn.Sequential(nn.Linear(3, 2))
    ghl.swap(model, types=nn.Linear)
    before = model[0].forward
    model[0].forward = lambda x: 2 * before(x)
    assert ghl.unswap(model) == ["0"]
    model(torch.ones(5, 3)).sum().backward()
    assert model[0].weight.grad.eq(10).all()


class Overriding(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Plain(torch.Tensor):
    pass


def test_weights_that_override_functions_are_left_alone():
    """What is made of them instead would be differentiated as the plain layer."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    for layer, kind in zip(model, (Overriding, Plain), strict=False):
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(kind))
    report = ghl.swap(model, types=nn.Linear)
    assert [*report.swapped] == ["1", "2"]
    assert report.skipped == {
        "0": "its weight is a Overriding, which overrides what functions do with it"
    }
    model[2].weight = model[0].weight
    with pytest.raises(TypeError, match="weight is a Overriding, which overrides what functions"):
        model[2](torch.ones(1, 3))


class Double(nn.Module):
    def forward(self, b):
        return 2 * b


@pytest.mark.parametrize("how", ["unswap", "unswap of a parametrized layer", "rule"])
def test_an_update_is_dropped_with_the_rule(how):
    """A later backward adds an ordinary gradient to none."""
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    if "parametrized" in how:
        nn.utils.parametrize.register_parametrization(net[0], "bias", Double())
    net(x).square().sum().backward()
    expected = net[0].weight.grad
    net.zero_grad()
    if "parametrized" in how:
        nn.utils.parametrize.remove_parametrizations(net[0], "bias", leave_parametrized=False)
    ghl.swap(net, types=nn.Linear)
    if "parametrized" in how:
        nn.utils.parametrize.register_parametrization(net[0], "bias", Double())
    net(x).square().sum().backward()
    if how == "rule":
        net[0].rule = "bp"
    else:
        ghl.unswap(net)
    assert net[0].weight.grad is None
    net(x).square().sum().backward()
    assert torch.equal(net[0].weight.grad, expected)


def test_a_report_names_what_attention_computes_without_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = ghl.swap(layer, types=nn.Linear)
    assert report.skipped["self_attn.in_proj"] == "is computed by a function, not by a layer"
    report = ghl.swap(layer, types=nn.Linear, exclude="*attn")
    assert report.skipped["self_attn.in_proj"] == "excluded"
    assert "self_attn.in_proj" not in ghl.swap(nn.Conv2d(1, 1, 1)).skipped


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_a_forward_of_its_own_is_left_alone(name):
    """What one layer has in place of its class's, as accelerate's hooks and tiling give it."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3))
    setattr(model[0], name, getattr(model[0], name))
    report = ghl.swap(model)
    assert report.skipped == {"0": "has a forward of its own, which may compute differently"}
    assert list(report.swapped) == ["1"]


def test_a_parametrized_layer_without_a_rule_computes_its_weight_once():
    """A power iteration more would be another weight."""
    plain = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))
    layer = nn.utils.parametrizations.spectral_norm(ghl.Conv2d(2, 3, 3, rule="bp"))
    layer.load_state_dict(plain.state_dict())
    for _ in range(3):
        assert torch.equal(layer(image()[:, :2]), plain(image()[:, :2]))
