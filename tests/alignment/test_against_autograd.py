"""A Monitor against plain autograd with explicit products, in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ghl.alignment import Monitor
from ghl_kernels import Rule
from tests.alignment import oracle

RULES = {
    "hebb": Rule(competition="linear", decay="none"),
    "oja": Rule(competition="linear", decay="oja"),
    "ghl": Rule(),
    "instar": Rule(competition="softmax", tau=0.5, decay="instar"),
}


def check(model, run, rule="hebb", tolerance=1e-10):
    model.double()
    monitor = Monitor(model, hebbian=rule if rule in ("hebb", "oja", "ghl") else RULES[rule])
    run(model).backward()
    report = monitor.report()
    calls = oracle.record(model, run)
    assert report.keys() == calls.keys()
    layers = dict(model.named_modules())
    for name, call in calls.items():
        wanted = oracle.expected(layers[name], *call, RULES[rule])
        oracle.assert_reported(report[name], wanted, tolerance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(rule, bias):
    model = nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 4, bias=bias))
    x, t = torch.randn(7, 5).double(), torch.randn(7, 4).double()
    check(model, lambda m: F.mse_loss(m(x), t), rule)


@pytest.mark.parametrize("rule", ["hebb", "oja", "ghl"])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"groups": 2, "padding": 1},
        {"groups": 2, "stride": 2, "dilation": 2, "bias": False},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "dilation": 1},
    ],
    ids=str,
)
def test_conv2d(rule, options):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, **options), nn.ReLU())
    x = torch.randn(2, 4, 7, 6).double()
    check(model, lambda m: m(x).square().mean(), rule)


def test_tokens_before_an_operation_in_place():
    """F.linear of three dimensions is a view, whose node an operation in place cuts off."""
    for bias in (True, False):
        model = nn.Sequential(nn.Linear(5, 6, bias=bias), nn.ReLU(inplace=True))
        x = torch.randn(3, 4, 5).double()
        check(model, lambda m, x=x: m(x).square().mean())


def test_conv2d_before_an_operation_in_place():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(3, 2, 4, 4).double()
    check(model, lambda m: m(x).square().mean())


class Separate(nn.Module):
    """Multi-head attention out of linear layers with the weights of nn.MultiheadAttention."""

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        E, self.heads = attention.embed_dim, attention.num_heads
        kdim, vdim = attention.kdim, attention.vdim
        self.q, self.k, self.v, self.out = (nn.Linear(c, E).double() for c in (E, kdim, vdim, E))
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            weights = [getattr(attention, name) for name in names]
        biases = attention.in_proj_bias.chunk(3)
        with torch.no_grad():
            for layer, w, b in zip((self.q, self.k, self.v), weights, biases, strict=True):
                layer.weight.copy_(w)
                layer.bias.copy_(b)
            self.out.load_state_dict(attention.out_proj.state_dict())

    def forward(self, query, key, value):
        def heads(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = heads(self.q(query)), heads(self.k(key)), heads(self.v(value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["self", "cross", "kdim"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention(kind, need_weights):
    options = {"kdim": 6, "vdim": 10} if kind == "kdim" else {}
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **options).double()
    nn.init.normal_(attention.in_proj_bias)
    query = torch.randn(3, 5, 8).double()
    key = query if kind == "self" else torch.randn(3, 4, options.get("kdim", 8)).double()
    value = torch.randn(3, 4, 10).double() if kind == "kdim" else key
    separate = Separate(attention)
    calls = oracle.record(separate, lambda m: m(query, key, value).square().mean())
    parts = {n: oracle.expected(getattr(separate, n), *calls[n]) for n in ("q", "k", "v", "out")}

    monitor = Monitor(attention)
    attention(query, key, value, need_weights=need_weights)[0].square().mean().backward()
    report = monitor.report()
    oracle.assert_reported(report["out_proj"], parts["out"])
    if kind == "kdim":
        for name in ("q", "k", "v"):
            oracle.assert_reported(report[f"{name}_proj"], parts[name])
        return
    wanted = torch.cat([parts[n]["batch"]["neurons"] for n in ("q", "k", "v")])
    torch.testing.assert_close(report["in_proj"]["batch"]["neurons"], wanted)
    wanted = torch.cat([parts[n]["sample"]["neurons"] for n in ("q", "k", "v")])
    torch.testing.assert_close(report["in_proj"]["sample"]["neurons"], wanted)
    if kind == "self":
        wanted = sum(parts[n]["batch"]["inner"] for n in ("q", "k", "v"))
        assert report["in_proj"]["batch"]["inner"] == pytest.approx(float(wanted))


def test_transformer_layer_and_timm_vit_have_no_gap():
    import timm

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    for model, x in ((layer, torch.randn(2, 5, 8)), (vit, torch.randn(2, 3, 32, 32))):
        with Monitor(model) as monitor:
            model(x).square().mean().backward()
            report = monitor.report()
        assert len(report) >= 4
        for name, found in report.items():
            assert found["batch"] and found["sample"], (name, found["gaps"])


def test_bfloat16_autocast():
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    x = torch.randn(64, 16)
    monitor = Monitor(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    half = monitor.report()
    monitor.remove()
    check(model, lambda m: m(x.double()).square().mean())
    with Monitor(model) as monitor:
        model(x.double()).square().mean().backward()
        full = monitor.report()
    for name, found in full.items():
        for part in ("batch", "sample"):
            assert half[name][part]["cosine"] == pytest.approx(found[part]["cosine"], abs=0.02)


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_a_direction_beyond_float16(size):
    """Summed over so many rows, though weight.grad is finite; or of small outputs."""
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.rand(100_000, 16) + 1
    nn.init.normal_(model[0].weight, std=size)
    nn.init.zeros_(model[0].bias)
    monitor = Monitor(model, statistic="batch")
    with torch.autocast("cpu", torch.float16):
        y = model(x)
    (y.float() / size).square().mean().mul(size).backward()
    w, S = model[0].weight.detach().double(), -model[0].weight.grad.double()
    B = (x.double() @ w.T).T @ x.double()
    cosine = float((S * B).sum() / S.norm() / B.norm())
    assert monitor.report()["0"]["batch"]["cosine"] == pytest.approx(cosine, abs=1e-3)
