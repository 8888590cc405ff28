"""What a Monitor refuses, and what it reports as a gap: never a wrong number."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import ghl
from ghl.alignment import Monitor
from tests.alignment.oracle import assert_same_report


def model_of_two():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def gap(monitor, name="0", part="layer"):
    found = monitor.report()[name]
    assert found["batch"] is None and found["sample"] is None and found["hebbian_share"] is None
    return found["gaps"][part]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0, must be an integer of at least 1"),
        ({"every": 2.5}, "every is 2.5"),
        ({"every": True}, "every is True"),
        ({"start": -1}, "start is -1, must be an integer of at least 0"),
        ({"hebbian": "heb"}, "hebbian is 'heb'.*did you mean 'hebb'"),
        ({"statistic": "all"}, "statistic is 'all', must be one of batch, sample, both"),
        ({"loss": "median"}, "loss is 'median'"),
        ({"signal": "dfa"}, "signal is 'dfa'"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Monitor(model_of_two(), **options)


def test_models():
    with pytest.raises(TypeError, match=r"model is Tensor, must be an nn\.Module"):
        Monitor(torch.zeros(1))
    with pytest.raises(ValueError, match="model is ReLU without a layer to measure"):
        Monitor(nn.ReLU())


def test_attached_twice():
    model = model_of_two()
    first = Monitor(model)
    for again in (model, nn.Sequential(model), model[2]):
        with pytest.raises(ValueError, match=r"has a Monitor already .*remove\(\) it first"):
            Monitor(again)
    first.remove()
    Monitor(model).remove()


def test_layer_that_never_ran():
    model = model_of_two()
    model.spare = nn.Linear(4, 4)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    monitor = Monitor(model)
    model(torch.randn(2, 3)).sum().backward()
    assert "did not run" in gap(monitor, "spare")
    assert monitor.report()["0"]["batch"]


def test_output_that_no_loss_sees():
    model = model_of_two()
    monitor = Monitor(model)
    y = model[0](torch.randn(2, 3))
    model[2](y.detach()).sum().backward()
    assert "no gradient reached" in gap(monitor)


def test_one_of_two_uses_without_gradient():
    model = model_of_two()
    monitor = Monitor(model)
    model(torch.randn(2, 3))
    model(torch.randn(2, 3)).sum().backward()
    assert gap(monitor) == "1 of 2 uses received no gradient"


def test_frozen_weight():
    model = model_of_two()
    model[0].weight.requires_grad_(False)
    monitor = Monitor(model)
    model(torch.randn(2, 3)).sum().backward()
    assert gap(monitor) == "its weight is frozen"


def test_evaluation_mode():
    model = model_of_two().eval()
    monitor = Monitor(model)
    with torch.no_grad():
        model(torch.randn(2, 3))
    assert "did not run in training" in gap(monitor)
    model(torch.randn(2, 3)).sum().backward()
    assert "evaluation mode" in gap(monitor)


def test_evaluation_between_training_steps_is_not_measured():
    model = model_of_two()
    monitor = Monitor(model)
    x = torch.randn(2, 3)
    model(x).sum().backward()
    before = monitor.report()["0"]
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 3))
    assert monitor.report()["0"]["batch"]["inner"] == before["batch"]["inner"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_signal_that_is_not_finite(bad):
    model = model_of_two()
    monitor = Monitor(model)
    (model(torch.randn(2, 3)).sum() * bad).backward()
    for part in ("batch", "sample"):
        assert "NaN or infinity" in gap(monitor, "2", part)


@pytest.mark.parametrize("hebbian", ["hebb", "oja", "ghl"])
def test_an_empty_batch(hebbian):
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 3))
    monitor = Monitor(model, hebbian=hebbian)
    model(torch.randn(0, 4, 3, 3)).sum().backward()
    for layer in ("0", "2"):
        for part in ("batch", "sample"):
            assert gap(monitor, layer, part) == "the batch was empty"
    monitor.step()
    model.zero_grad()
    model(torch.randn(2, 4, 3, 3)).sum().backward()
    for found in monitor.report().values():
        assert -1 <= found["batch"]["cosine"] <= 1 and -1 <= found["sample"]["cosine"] <= 1


@pytest.mark.parametrize(("size", "scale"), [(1e12, 1e-6), (1.0, 1e-22)])
def test_numbers_whose_squares_leave_the_range(size, scale):
    """There is a cosine, but ‖B‖² or ‖S‖² is none of float32's numbers: it is not 0, nor any."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    monitor = Monitor(model)
    (model(torch.randn(2, 3) * size).sum() * scale).backward()
    for part in ("batch", "sample"):
        assert gap(monitor, part=part)


def test_given_signals():
    monitor = Monitor(model_of_two(), signal="given")
    with pytest.raises(ValueError, match=r"signal has shape \(3, 4\), must be \(4, 3\)"):
        monitor.measure("0", torch.zeros(3, 4))
    with pytest.raises(KeyError, match="name is '1', must be one of 0, 2"):
        monitor.measure("1", torch.zeros(4, 3))
    with pytest.raises(TypeError, match="signal is NoneType, must be a dense Tensor"):
        monitor.measure("0", None)
    with pytest.raises(TypeError, match=r"signal is torch.sparse_coo, must be a dense Tensor"):
        monitor.measure("0", torch.zeros(4, 3).to_sparse())
    monitor.measure("0", torch.full((4, 3), float("nan")))
    assert "did not run" in gap(monitor)
    with pytest.raises(RuntimeError, match="must be 'given'"):
        Monitor(model_of_two()).measure("0", torch.zeros(4, 3))


def test_given_signal_that_is_nan():
    model = model_of_two()
    monitor = Monitor(model, signal="given")
    model(torch.randn(2, 3))
    monitor.measure("0", torch.full((4, 3), float("nan")))
    assert "NaN" in gap(monitor, "0", "batch")
    assert "of the whole batch" in gap(monitor, "0", "sample")


def test_swapped_after_attaching():
    model = model_of_two()
    monitor = Monitor(model)
    ghl.swap(model, types=nn.Linear)
    model(torch.randn(2, 3)).sum().backward()
    assert "was swapped after" in gap(monitor)


def test_weight_replaced_after_attaching():
    model = model_of_two()
    monitor = Monitor(model)
    model[0].weight = nn.Parameter(torch.randn(4, 3))
    model(torch.randn(2, 3)).sum().backward()
    assert "another one" in gap(monitor)


def test_layers_that_compute_differently():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(3, 4), weight_norm(nn.Linear(4, 4)), nn.LazyLinear(2))
    monitor = Monitor(model)
    assert "Scaled, which may compute differently" in gap(monitor, "0")
    assert "which may compute differently" in gap(monitor, "1")
    assert "LazyLinear" in gap(monitor, "2")


def test_layers_of_other_kinds_are_told():
    """Not left out: a report without them would look complete."""

    class Conv1D(nn.Module):
        """As in transformers' GPT-2."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.weight

    kinds = (
        nn.Linear(4, 4),
        Conv1D(),
        nn.LayerNorm((2, 4)),
        nn.Embedding(3, 4),
        nn.Conv1d(2, 2, 1),
    )
    model = nn.Sequential(*kinds)
    model.forward = lambda x: model[4](model[2](model[1](model[0](x))))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 2, 4)).square().mean().backward()
        optimizer.step()
    assert list(monitor.report()) == ["0", "1", "4"]
    assert monitor.report()["0"]["batch"]
    assert "is a Conv1D, a kind of layer that is not measured" in gap(monitor, "1")
    assert "is a Conv1d" in gap(monitor, "4")


def test_weight_shared_with_an_embedding():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    monitor = Monitor(nn.Sequential(embedding, head))
    assert "shared with '0' (Embedding)" in gap(monitor, "1")


def doubled_by_a_hook(layer):
    layer.register_forward_hook(lambda module, args, y: 2 * y)


def with_an_adapter(layer):
    A = torch.randn(layer.weight.shape)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias) + x @ A.T


def with_another_input(layer):
    layer.forward = lambda x: nn.functional.linear(3 * x + 1, layer.weight, layer.bias)


@pytest.mark.parametrize("change", [doubled_by_a_hook, with_an_adapter, with_another_input])
def test_output_that_is_not_the_layers_own(change):
    model = model_of_two()
    change(model[0])
    monitor = Monitor(model)
    model(torch.randn(2, 3)).square().sum().backward()
    assert gap(monitor) == "its output was changed by a hook, or its forward replaced"
    assert monitor.report()["2"]["batch"]


def test_frozen_after_attaching():
    model = model_of_two()
    monitor = Monitor(model)
    model[0].weight.requires_grad_(False)
    model(torch.randn(2, 3)).sum().backward()
    assert gap(monitor) == "its weight is frozen"


def test_gradients_that_are_no_signal():
    """Of a weight, by autograd.grad: a gap. Of inputs, as for adversarial examples: ignored."""
    model, x = model_of_two(), torch.randn(2, 3, requires_grad=True)
    reports = []
    for adversarial in (False, True):
        with Monitor(model) as monitor:
            loss = model(x).square().sum()
            if adversarial:
                torch.autograd.grad(loss, x, retain_graph=True)
            loss.backward()
            reports.append(monitor.report())
            model.zero_grad()
    assert_same_report(*reports)
    monitor = Monitor(model)
    loss = model(x).square().sum()
    torch.autograd.grad(loss, model[0].weight, retain_graph=True)
    loss.backward()
    assert "did not reach weight.grad" in gap(monitor)


@pytest.mark.parametrize("again", [False, True])
def test_gradient_penalty(again):
    """What comes back through a backward is a signal that no hook on an output sees; also with a
    forward in between."""
    model, x = model_of_two(), torch.randn(2, 3, requires_grad=True)
    monitor = Monitor(model)
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    y = model(x) if again else y
    (y.square().sum() + slope.square().sum()).backward()
    assert "create_graph=True" in gap(monitor)


class Pair(nn.Linear):
    def forward(self, features):
        return super().forward(features), features


@pytest.mark.parametrize("named", [False, True])
def test_a_forward_that_is_not_from_tensor_to_tensor(named):
    layer = nn.Linear(3, 2)
    layer.forward = Pair.forward.__get__(layer, nn.Linear)
    layer.__class__ = Pair
    monitor = Monitor(nn.Sequential(layer))
    y, _ = layer(features=torch.randn(4, 3)) if named else layer(torch.randn(4, 3))
    y.sum().backward()
    assert gap(monitor)


def test_features_of_inference_mode():
    with torch.inference_mode():
        x = torch.randn(5, 3)
    model, reports = model_of_two(), []
    for features in (x, x.clone()):
        model.zero_grad()
        with Monitor(model) as monitor, torch.autocast("cpu", torch.bfloat16):
            model(features).square().sum().backward()
            reports.append(monitor.report())
    assert_same_report(*reports)


def test_weights_without_a_cosine():
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.complex64))
    monitor = Monitor(model)
    assert "complex64: there is no cosine" in gap(monitor)
    model(torch.randn(2, 3, dtype=torch.complex64)).abs().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def test_a_tracer_sees_the_model_alone():
    model, x = model_of_two(), torch.randn(2, 3)
    with Monitor(model):
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))


def test_gradients_set_to_zero_without_a_step():
    """As by a skipped step of a GradScaler and zero_grad(set_to_none=False)."""
    model = model_of_two()
    monitor = Monitor(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.zero_grad(set_to_none=False)
    assert "set_to_none=True" in gap(monitor)


@pytest.mark.parametrize("statistic", ["both", "sample"])
def test_a_gradient_that_is_zero_was_not_set_to_zero(statistic):
    """A zero-initialised head: the layers before it get zeros from every backward."""
    model = model_of_two()
    nn.init.zeros_(model[2].weight)
    monitor = Monitor(model, statistic=statistic)
    for _ in range(2):
        model(torch.randn(2, 3)).sum().backward()
    assert "a norm is zero" in gap(monitor, "0", "sample")


def test_a_gap_has_no_weight_norm_of_its_own_making():
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)
    report = Monitor(model).report()
    assert report["0"]["weight_norm"] is None
    assert report["1"]["weight_norm"] is None


def test_input_overwritten_in_place():
    model = nn.Sequential(nn.Linear(3, 4))
    monitor = Monitor(model)
    x = torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):  # autograd keeps its own bfloat16 copy of x
        y = model(x)
    x.zero_()
    y.sum().backward()
    assert "overwritten in place" in gap(monitor)


def test_compiled_model_is_a_gap():
    model = model_of_two()
    monitor = Monitor(model)
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 3)).sum().backward()
    assert "torch.compile" in gap(monitor)
