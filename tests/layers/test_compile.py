"""torch.compile without graph breaks: the updates of eager mode, traced once."""

import copy

import pytest
import torch
import torch._dynamo
import torchvision
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code

import ghl
import ghl_kernels
from ghl_kernels import composed

BOTH = (nn.Conv2d, nn.Linear)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small_net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 5)
    )
    ghl.swap(model, types=BOTH)
    return model


def shared_net():
    torch.manual_seed(1)
    layer = ghl.Conv2d(4, 4, 3, padding="same")
    return nn.Sequential(layer, nn.Tanh(), layer, nn.ReLU(inplace=True))


def resnet():
    torch.manual_seed(2)
    model = torchvision.models.resnet18(num_classes=5).eval()
    ghl.swap(model)
    return model


INPUTS = {small_net: (2, 3, 8, 8), shared_net: (2, 4, 6, 6), resnet: (1, 3, 32, 32)}


def gradients(run, model, x):
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_compiled_like_eager(model, x, backend, rounding=1e-4):
    """Two steps, the second without a new compilation, have the gradients of eager mode."""
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn_like(x)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            given = gradients(compiled, compiled._orig_mod, x)
        for name, expected in gradients(model, model, x).items():
            wrong = (given[name] - expected).abs() > rounding * expected.abs().amax()
            assert wrong.double().mean() < 1e-3, name  # the sign of a G that is all rounding
            assert given[name].stride() == expected.stride()


@pytest.mark.parametrize("make", INPUTS)
def test_aot_eager(make):
    """Traced forward and backward, run by PyTorch's own operators."""
    assert_compiled_like_eager(make(), torch.zeros(INPUTS[make]), "aot_eager")


@pytest.mark.parametrize("make", [small_net, shared_net])
def test_inductor(make):
    """Generated code around our operators."""
    assert_compiled_like_eager(make(), torch.zeros(INPUTS[make]), "inductor")


@pytest.mark.parametrize("preset", ["hebb", "sign", "bp"])
def test_presets(preset):
    """Other gates, traced anew when the rule of a layer changes."""
    model, x = small_net(), torch.zeros(INPUTS[small_net])
    ghl.swap(model, preset, types=BOTH)
    assert_compiled_like_eager(model, x, "aot_eager")


def test_output_is_saved_without_a_copy():
    """The copy of y in the traced graph, there for operations in place, is gone from the code."""
    model, x = small_net(), torch.zeros(INPUTS[small_net])
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    traced = torch.compile(model, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    traced(x).sum().backward()
    assert graphs[0].count("aten.clone") == 2
    assert "aten.clone" not in graphs[1]

    torch._dynamo.reset()
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    _, (forward, _) = run_and_get_code(lambda: compiled(x).sum().backward())
    returned = forward[forward.index("def call") :].split("return (")[1].split(")\n")[0]
    convolution = forward.split(" = extern_kernels.convolution(")[0].split()[-1]
    linear = forward.split("out=")[1].split(")")[0]
    assert convolution in returned.split(", ")
    assert returned.count(f"{linear},") == 2


def test_autocast():
    """Under autocast in the caller, as in eager mode; compiled once, whatever the first step
    changes."""
    model, x = small_net(), torch.randn(INPUTS[small_net])
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients(compiled, compiled._orig_mod, x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            given = gradients(compiled, compiled._orig_mod, x)
        expected = gradients(model, model, x)
    for name in expected:
        torch.testing.assert_close(given[name], expected[name], atol=1e-2, rtol=1e-2)


def test_another_batch_size():
    """A second size makes the batch symbolic, a third needs nothing new."""
    model = small_net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in (2, 3, 5):
        x = torch.randn(size, 3, 8, 8)
        with torch._dynamo.config.patch(error_on_recompile=size == 5):
            given = gradients(compiled, model, x)
        for name, expected in gradients(model, model, x).items():
            torch.testing.assert_close(given[name], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("net", [small_net, shared_net])
def test_a_temperature_that_changes(net, dynamic):
    """Of a Rule that layers share, and of a layer that is used twice: it must be a constant."""
    model, x = net(), torch.randn(INPUTS[net])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tau in (1.0, 0.7, 0.1):
        ghl.swap(model, rule=ghl.Rule(tau=tau), types=BOTH)
        given = gradients(compiled, model, x)
        for name, expected in gradients(model, model, x).items():
            torch.testing.assert_close(given[name], expected, atol=1e-4, rtol=1e-4)


def test_after_a_state_was_assigned():
    """New Parameters are taken up when they are loaded, not inside the traced forward."""
    model, x = small_net(), torch.randn(INPUTS[small_net])
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    given = gradients(compiled, model, x)
    for name, expected in gradients(model, model, x).items():
        torch.testing.assert_close(given[name], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("another", [False, True])
def test_memory_format_changed_between_a_forward_and_its_backward(synchronized, another):
    """With another forward in between, or none, in which torch 2.11 fails, plain layers too."""
    model = nn.Sequential(ghl.Conv2d(3, 8, 3), nn.ReLU(), ghl.Conv2d(8, 4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if synchronized:
        ghl.synchronize(model, optimizer)
    compiled, x = torch.compile(model), torch.randn(2, 3, 9, 9)
    loss = compiled(x).square().sum()
    model.to(memory_format=torch.channels_last)
    errors = RuntimeError, AssertionError
    with pytest.raises(errors, match=r"holds an ordinary gradient, because no layer|, stride 1=="):
        if another:
            compiled(x)
        loss.backward()
        optimizer.step()


def test_no_grad():
    """Without gradients the traced model is the plain one."""
    model, x = small_net(), torch.randn(INPUTS[small_net])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_hook_on_a_compiled_weight_is_an_error_or_sees_the_update():
    """In one traced graph gradients come in no set order; an ordinary one is never passed on."""
    model, x, seen = small_net(), torch.randn(INPUTS[small_net]), []
    for i in (0, 3):
        model[i].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    with pytest.raises(RuntimeError, match="post-accumulate-grad hook of its own"):
        gradients(torch.compile(model, backend="aot_eager"), model, x)
    assert all(update.abs().max() == 1 for update in seen)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_output_overwritten_in_the_graph(leading):
    """Of a linear layer, by operations that write all of it or some."""

    def run(layer, x):
        y = layer(x)
        y += 0.5
        y[..., 0] = 0
        return torch.relu_(y)

    torch.manual_seed(4)
    layer, x = ghl.Linear(5, 4), torch.randn(*leading, 5)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    given, expected = (
        gradients(lambda x, run=run: run(layer, x), layer, x) for run in (compiled, run)
    )
    torch.testing.assert_close(given, expected)


def test_output_overwritten_outside_the_graph():
    """The copy of an output that inductor drops is missed by an error, not by a wrong update; of
    views, whose version nobody knows, README says so."""
    torch.manual_seed(3)
    layer, x = ghl.Linear(5, 4), torch.randn(3, 5)
    y = torch.compile(layer, fullgraph=True)(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_compiled_gradients_reach_the_kernels_as_they_lie(monkeypatch):
    """dynamo makes gradients contiguous for a backward that asks how a tensor lies; each would be
    copied there and back."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    ghl.swap(model)
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    met = []
    run = composed.pair

    def pair(problem, *tensors):
        met.append([t.is_contiguous(memory_format=torch.channels_last) for t in tensors[:4]])
        return run(problem, *tensors)

    monkeypatch.setattr(composed, "pair", pair)
    with ghl_kernels.force("composed"):
        for backend in ("aot_eager", "inductor"):
            torch._dynamo.reset()
            torch.compile(model, backend=backend, fullgraph=True)(x).square().sum().backward()
            model.zero_grad()
    assert met == [[True] * 4] * 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd_of_a_compiled_forward(backend):
    """What is left to be done at the end of a backward is traced there."""
    model, x = small_net(), torch.randn(4, 3, 8, 8)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        model.zero_grad()
        loss = compiled(x).square().sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}])
def test_ddp_of_one_rank_compiled_is_an_error(options, tmp_path):
    """Its buckets have seen gradients before H0 was there."""
    model, x = small_net(), torch.randn(4, 3, 8, 8)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        compiled = torch.compile(wrapped, backend="aot_eager")
        with pytest.raises(RuntimeError, match=r"by DistributedDataParallel.*ghl.synchronize"):
            for _ in range(2):  # a static graph is looked at in the first backward
                model.zero_grad()
                compiled(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("zero", [True, False])
def test_an_optimizer_within_a_compiled_backward_is_an_error(zero):
    """As a hook of the node that accumulates, of which nobody can tell that it is there."""
    model, x = small_net(), torch.randn(4, 3, 8, 8)
    optimizers = []
    for layer in (model[0], model[3]):
        optimizer = torch.optim.SGD([layer.weight], 0.1)
        node = layer.weight.view_as(layer.weight).grad_fn.next_functions[0][0]

        def step(*gradients, optimizer=optimizer):
            optimizer.step()
            if zero:
                optimizer.zero_grad()

        node.register_hook(step)
        optimizers.append((optimizer, node))
    with pytest.raises(RuntimeError, match="an optimizer's step within backward"):
        torch.compile(model, backend="aot_eager")(x).square().sum().backward()
