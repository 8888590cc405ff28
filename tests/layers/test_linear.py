"""ghl.Linear: any leading dimensions, any rule, and nothing but weight.grad differs from nn."""

import pytest
import torch
from torch import nn

import ghl
from ghl_kernels import Rule
from ghl_kernels.rule import CHOICES

from .oracle import assert_like_reference, assert_update, record

IN, OUT = 6, 5


def linear(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT, **{"dtype": torch.float64, **options}))


def loss_of(x, seed=1):
    """A loss with a different weight for every output."""

    def run(model):
        y = model(x)
        generator = torch.Generator().manual_seed(seed)
        target = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        return (y * target.to(y.dtype)).sum() + y.square().sum()

    return run


@pytest.mark.parametrize("leading", [(), (7,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_number_of_leading_dimensions(leading, bias, dtype):
    """Rows are all but the last dimension, whatever their number."""
    x = torch.randn(*leading, IN, dtype=dtype, generator=torch.Generator().manual_seed(2))
    assert_like_reference(linear(bias=bias, dtype=dtype), loss_of(x))


@pytest.mark.parametrize("gate", CHOICES["gate"])
@pytest.mark.parametrize("decay", CHOICES["decay"])
@pytest.mark.parametrize("competition", CHOICES["competition"])
def test_every_choice_of_a_rule(competition, decay, gate):
    """Every competition, decay, gate and normalisation reaches weight.grad."""
    torch.manual_seed(3)
    x = torch.randn(9, IN, dtype=torch.float64)
    for normalize in CHOICES["normalize"]:
        rule = Rule(competition, 0.7, decay, gate, normalize)
        assert_like_reference(linear(), loss_of(x), rule)


@pytest.mark.parametrize("preset", ["ghl", "hebb", "sign", "bp"])
def test_presets(preset):
    """A preset's name is as good as the Rule it stands for."""
    torch.manual_seed(4)
    x = torch.randn(9, IN, dtype=torch.float64)
    model = assert_like_reference(linear(), loss_of(x), preset)
    assert model[0].rule == Rule.preset(preset)


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
def test_strided_input_and_expanded_gradient(strides):
    """x of any strides, and the stride-0 gradient that sum().backward() sends."""
    torch.manual_seed(5)
    x = {
        "transposed": torch.randn(4, 3, IN).transpose(0, 1),
        "sliced": torch.randn(4, 3, 2 * IN)[..., ::2],
        "expanded": torch.randn(IN).expand(4, IN),
    }[strides].double()
    model, g = linear(), torch.ones((), dtype=torch.float64).expand(*x.shape[:-1], OUT)
    assert_like_reference(model, lambda m: m(x).sum())
    layer = ghl.Linear(IN, OUT, dtype=torch.float64)
    layer.load_state_dict(model[0].state_dict())
    layer(x).backward(g)
    assert_update(layer.weight, record(model, lambda m: m(x).sum())["0"], Rule())


def test_is_a_linear_with_its_arguments():
    """The same parameters from the same seed, and the rule in the repr."""
    torch.manual_seed(6)
    plain = nn.Linear(IN, OUT, False, "cpu", torch.float64)
    torch.manual_seed(6)
    layer = ghl.Linear(IN, OUT, False, "cpu", torch.float64, "hebb")
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert torch.equal(layer.weight, plain.weight)
    assert "in_features=6" in repr(layer)
    assert "hebb" in repr(layer)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_plain_layer(context):
    """The same bits as nn.Linear, and nothing to differentiate."""
    torch.manual_seed(7)
    layer, x = ghl.Linear(IN, OUT), torch.randn(3, IN)
    with context():
        y = layer(x)
        assert torch.equal(y, nn.Linear.forward(layer, x))
    assert not y.requires_grad


def test_frozen_parameters():
    """A frozen weight makes it the plain layer; a frozen bias changes nothing else."""
    torch.manual_seed(8)
    x = torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
    plain = linear()
    plain[0].bias.requires_grad_(False)
    model = assert_like_reference(plain, loss_of(x))
    assert model[0].bias.grad is None

    layer = ghl.Linear(IN, OUT, dtype=torch.float64)
    layer.weight.requires_grad_(False)
    y = layer(x)
    assert "LinearFunction" not in type(y.grad_fn).__name__
    y.sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_weight_unfrozen_after_construction():
    """A layer made with a frozen weight gives updates once that is trained."""
    torch.manual_seed(9)
    layer = ghl.Linear(IN, OUT, rule="sign")
    layer.weight.requires_grad_(False)
    layer.rule = "sign"
    layer.weight.requires_grad_(True)
    layer(torch.randn(3, IN)).square().sum().backward()
    assert layer.weight.grad.abs().eq(1).all()


def test_evaluation_mode_changes_nothing():
    """eval() does not change what backward computes."""
    torch.manual_seed(10)
    x = torch.randn(7, IN, dtype=torch.float64)
    assert_like_reference(linear().eval(), loss_of(x))


def test_no_rows_give_a_zero_update():
    """An empty batch is not an error."""
    layer = ghl.Linear(IN, OUT)
    layer(torch.zeros(0, IN)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(OUT, IN))


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)], ids=str)
def test_a_layer_without_weights_is_the_plain_one(sizes):
    with pytest.warns(UserWarning, match="zero-element"):
        layer = ghl.Linear(*sizes)
    x = torch.randn(3, sizes[0], requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape and x.grad is not None


def test_complex_weights_are_refused():
    with pytest.raises(TypeError, match=r"weight is of torch\.complex64, must be of floating-po"):
        ghl.Linear(3, 4, dtype=torch.complex64)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged, torch.sparse_coo], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inputs_that_are_not_dense_are_refused(layout):
    """But where there is no update to be made."""
    layer, rows = ghl.Linear(3, 4), [torch.randn(2, 3), torch.randn(1, 3)]
    if layout == torch.sparse_coo:
        x = rows[0].to_sparse()
    else:
        x = torch.nested.nested_tensor(rows, layout=layout)
    with pytest.raises(TypeError, match=r"input of Linear is .*, must be a dense tensor"):
        layer(x)
    with torch.no_grad():
        assert layer(x).size(0) == 2
    layer.rule = "sign"
    y = layer(x)
    (y.values() if y.layout == torch.jagged else torch.cat([*y.unbind()])).sum().backward()
    assert layer.weight.grad.abs().max() == 1


def test_no_dimension_is_an_error_of_linear():
    with pytest.raises(RuntimeError, match="at least 1D"):
        ghl.Linear(3, 4)(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"cannot be multiplied \(6x0 and 3x4\)"):
        ghl.Linear(3, 4)(torch.zeros(2, 3, 0))


def test_nan_reaches_the_update():
    """NaN in x is not hidden by the gate or the maximum."""
    torch.manual_seed(11)
    layer, x = ghl.Linear(IN, OUT), torch.randn(3, IN)
    x[1, 2] = float("nan")
    layer(x).square().sum().backward()
    assert layer.weight.grad.isnan().any()


@pytest.mark.parametrize("transposed", [False, True])
def test_update_has_the_strides_of_the_weight(transposed):
    """Optimizers that view weight and gradient together need the same memory order."""
    torch.manual_seed(12)
    plain = linear()
    if transposed:
        plain[0].weight = nn.Parameter(plain[0].weight.detach().t().contiguous().t())
    model = assert_like_reference(plain, loss_of(torch.randn(7, IN, dtype=torch.float64)))
    assert model[0].weight.grad.stride() == ((1, OUT) if transposed else (IN, 1))


def test_wrong_rule_is_a_clear_error():
    """The argument, the value and the nearest choice are named."""
    with pytest.raises(ValueError, match=r"rule is 'ghk'.*did you mean 'ghl'"):
        ghl.Linear(IN, OUT, rule="ghk")
    layer = ghl.Linear(IN, OUT)
    with pytest.raises(ValueError, match="tau"):
        layer.rule = Rule(tau=0.0)
    assert layer.rule == Rule()
