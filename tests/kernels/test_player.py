"""Calls that csrc/replay plays do what the operator in Python does, and are played where they are
like an earlier one, nowhere else. On a CPU, whose operators are recorded here as a GPU's are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import LAYOUTS, Conv, Layer, Linear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ghl
import ghl_kernels
from ghl_kernels import Rule, dispatch, ops, replay
from ghl_kernels.tapes import player

pytestmark = pytest.mark.skipif(player.module() is None, reason="csrc/replay is not built for this")

LAYERS: dict[str, Layer] = {
    "linear": Linear(24, 18, 10),
    "pointwise": Conv(2, 16, (3, 4), 8, kernel=(1, 1)),
    "conv": Conv(1, 8, (4, 5), 8, kernel=(1, 3), padding=(0, 1)),
    "strided": Conv(2, 8, (7, 6), 8, kernel=(1, 1), stride=(2, 2)),
    "depthwise": Conv(1, 8, (4, 5), 8, kernel=(1, 3), groups=8),
}
HALF = torch.bfloat16
DEFAULT = Rule()


def name_of(layer: Layer) -> str:
    return "linear_pair" if isinstance(layer, Linear) else "conv2d_pair"


def pair(layer: Layer, tensors: list[Tensor], rule: Rule = DEFAULT) -> Any:
    operator = getattr(torch.ops.ghl_kernels, ops.NO_GRAD[name_of(layer)])
    return called(operator, layer, tensors, rule)


def pair_in_python(layer: Layer, tensors: list[Tensor], rule: Rule = DEFAULT) -> Any:
    """What an operator does for whom nothing is recorded."""
    return called(getattr(ops, name_of(layer)), layer, tensors, rule)


def called(operator: Any, layer: Layer, tensors: list[Tensor], rule: Rule) -> Any:
    geometry = () if isinstance(layer, Linear) else layer.geometry
    return operator(*tensors, *geometry, rule.competition, rule.tau)


def played(name: str = "conv2d_pair") -> int:
    return player.last(name)[0]


def assert_same(results: Any, wanted: Any) -> None:
    for result, expected in zip(results, wanted, strict=True):
        assert result.dtype == expected.dtype and result.stride() == expected.stride()
        assert torch.equal(result, expected)


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Recorded and played like a GPU's."""
    monkeypatch.setattr(replay, "_tapes", {})
    monkeypatch.setattr(replay, "on_gpu", lambda t: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    registered = [
        player.serve(other, name, "CPU", multiplies=name in ops.TAKES_ACTIVATIONS)
        for name, other in ops.NO_GRAD.items()
    ]
    yield
    player.forget()
    del registered


@pytest.fixture(params=["native", "composed"])
def implementation(
    request: pytest.FixtureRequest, on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> str:
    """What calls take, without being forced: those would not be played."""
    backend = ghl_kernels.Backend(request.param, "for a test")
    if reason := dispatch.unavailable(request.param, torch.empty(0), None):
        pytest.skip(reason)
    monkeypatch.setattr(dispatch, "settled", lambda *_: backend)
    return request.param


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("competition", ["softmax", "hard"])
def test_the_third_call_of_a_kind_is_played(
    layer: Layer, layout: str, competition: str, implementation: str
) -> None:
    if isinstance(layer, Linear) and layout == "channels_last":
        pytest.skip("a matrix has no channels")
    name = name_of(layer)
    rule, before = Rule(competition, tau=0.7), played(name)
    for number in range(4):
        tensors = [LAYOUTS[layout](t) for t in layer.tensors(HALF)]
        assert_same(pair(layer, tensors, rule), pair_in_python(layer, tensors, rule))
        assert played(name) - before == max(0, number - 1)
        last = ghl_kernels.last(name)
        assert last is not None and last.name == implementation


used = pytest.mark.parametrize("used_as", [None, torch.float32, HALF], ids=str)


@pytest.mark.parametrize("rule", [Rule(), Rule(decay="instar", gate="hebb", normalize="mean")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
@used
def test_merges(rule: Rule, layout: str, used_as: torch.dtype | None, implementation: str) -> None:
    choices, before = (rule.decay, rule.gate, rule.normalize, used_as), played("merge")
    for number in range(4):
        w = LAYOUTS[layout](torch.randn(4, 3, 2, 2))
        sums = [torch.randn_like(w), torch.randn(4, 12), torch.rand(5), w]
        assert_same(
            torch.ops.ghl_kernels.merge_no_grad(*sums, *choices), ops.merge(*sums, *choices)
        )
        assert played("merge") - before == max(0, number - 1)


@pytest.mark.parametrize("rule", [Rule(), Rule(decay="instar", gate="hebb", normalize="mean")])
@used
def test_merges_of_many_layers(
    rule: Rule, used_as: torch.dtype | None, implementation: str
) -> None:
    choices, before = (rule.decay, rule.gate, rule.normalize, used_as), played("foreach_merge")
    shapes = (4, 3), (2, 5), (6, 3, 2, 2)
    for number in range(4):
        w = [torch.randn(shape) for shape in shapes]
        G, H0 = ([torch.randn_like(one) for one in w] for _ in range(2))
        H0[-1] = H0[-1].flatten(1)
        totals = [torch.rand(one.shape[0] + 1) for one in w]
        results = torch.ops.ghl_kernels.foreach_merge_no_grad(G, H0, totals, w, *choices)
        for result, wanted in zip(
            results, ops.foreach_merge(G, H0, totals, w, *choices), strict=True
        ):
            assert_same(result, wanted)
        assert played("foreach_merge") - before == max(0, number - 1)


def test_lists_that_are_no_layers(on_a_cpu: None) -> None:
    w = [torch.randn(4, 3)]
    merges = torch.ops.ghl_kernels.foreach_merge_no_grad
    for _ in range(4):
        with pytest.raises(ValueError, match="G is an empty list"):
            merges([], [], [], [], "oja", "sign", "absmax")
        with pytest.raises(ValueError, match="H0 has 0 tensors"):
            merges(w, [], [torch.rand(5)], w, "oja", "sign", "absmax")


def test_kinds(on_a_cpu: None) -> None:
    """What differs in anything but numbers is another kind, which has tapes of its own."""
    layer = LAYERS["conv"]
    x, y, g, w = layer.tensors(HALF)
    aligned = torch.empty(x.numel() + 8, dtype=HALF)
    moved = aligned[1 : 1 + x.numel()].view_as(x).copy_(x)
    padded = dataclasses.replace(layer, kernel=(3, 3), padding=(1, 1))
    kinds: list[tuple[Layer, list[Tensor], Rule]] = [
        (layer, [x, y, g, w], Rule()), (layer, [x, y, g, w], Rule(tau=0.5)),
        (layer, [x, y, g, w], Rule("hard")), (layer, [x, y, g, w.float()], Rule()),
        (layer, [t.half() for t in (x, y, g, w)], Rule()), (layer, [moved, y, g, w], Rule()),
        (layer, [LAYOUTS["channels_last"](x), y, g, w], Rule()),
        (layer, [x, y, g[..., :1].expand_as(g), w], Rule()),
        (padded, padded.tensors(HALF), Rule()),
    ]  # fmt: skip
    for _ in range(2):
        before = played()
        for kind in kinds:
            pair(*kind)
        assert played() == before
    for kind in kinds:
        assert_same(pair(*kind), pair_in_python(*kind))
    assert played() == before + len(kinds)


def test_float32_may_be_tf32_which_only_python_asks(on_a_cpu: None) -> None:
    layer, before = LAYERS["conv"], played()
    for _ in range(4):
        tensors = layer.tensors()
        assert_same(pair(layer, tensors), pair_in_python(layer, tensors))
    assert played() == before


@pytest.fixture
def recorded(on_a_cpu: None) -> Callable[[], int]:
    """How often calls of a layer were played since; they will be."""
    layer = LAYERS["conv"]
    for _ in range(2):
        pair(layer, layer.tensors(HALF))
    before = played()
    return lambda: played() - before


def call() -> Any:
    return pair(LAYERS["conv"], LAYERS["conv"].tensors(HALF))


def test_what_is_forced_is_not_played(recorded: Callable[[], int]) -> None:
    with ghl_kernels.force("composed"):
        call()
        assert dispatch.last("conv2d_pair") == ghl_kernels.Backend("composed", "forced")
    assert recorded() == 0
    call()
    assert recorded() == 1
    assert dispatch.last("conv2d_pair") != ghl_kernels.Backend("composed", "forced")


def test_what_is_forgotten_is_recorded_again(recorded: Callable[[], int]) -> None:
    dispatch.unsettle()
    call()
    call()
    assert recorded() == 0
    call()
    assert recorded() == 1


def test_what_was_forgotten_meanwhile_is_not_kept(
    recorded: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tape that was made of the table of before."""
    dispatch.unsettle()
    call()
    own = dispatch.settled_last

    def meanwhile(operator: str) -> Any:
        dispatch.unsettle()
        return own(operator)

    with monkeypatch.context() as late:
        late.setattr(dispatch, "settled_last", meanwhile)
        call()
    call()
    assert recorded() == 0


def test_calls_within_a_call_are_not_taken_for_it(
    on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finalizer, say, or a hook of Triton's."""
    layer, settled = LAYERS["conv"], dispatch.settled
    tensors, others = layer.tensors(HALF), layer.tensors(HALF)
    for _ in range(3):
        pair(layer, others, Rule(tau=0.5))

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(dispatch, "settled", settled)
        for operator in (torch.ops.ghl_kernels.conv2d_pair, ops.conv2d_pair):
            called(operator, layer, others, Rule(tau=0.5))
        pair(layer, others, Rule(tau=0.5))
        return settled(*arguments)

    for _ in range(3):
        monkeypatch.setattr(dispatch, "settled", meanwhile)
        assert_same(pair(layer, tensors), pair_in_python(layer, tensors))
    assert_same(pair(layer, others, Rule(tau=0.5)), pair_in_python(layer, others, Rule(tau=0.5)))


def test_errors_are_those_of_python(recorded: Callable[[], int]) -> None:
    layer = LAYERS["conv"]
    x, y, g, w = layer.tensors(HALF)
    for _ in range(3):
        with pytest.raises(ValueError, match="g has shape"):
            pair(layer, [x, y, g[:, :7], w])
        with pytest.raises(TypeError, match="g has layout"):
            pair(layer, [x, y, g.to_sparse(), w])
        with pytest.raises(ValueError, match="tau is nan"):
            torch.ops.ghl_kernels.conv2d_pair_no_grad(
                x, y, g, w, *layer.geometry, "softmax", float("nan")
            )
    assert recorded() == 0


def test_threads_play_one_tape_beside_each_other(recorded: Callable[[], int]) -> None:
    layer = LAYERS["conv"]
    mine = [layer.tensors(HALF) for _ in range(4)]
    wanted = [pair_in_python(layer, tensors) for tensors in mine]

    def work(number: int) -> list:
        return [pair(layer, mine[number]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for results, expected in zip(pool.map(work, range(4)), wanted, strict=True):
            for result in results:
                assert_same(result, expected)
    assert recorded() == 80


def test_what_is_played_has_memory_of_its_own(recorded: Callable[[], int]) -> None:
    layer = LAYERS["conv"]
    tensors = layer.tensors(HALF)
    once, twice = pair(layer, tensors), pair(layer, layer.tensors(HALF))
    kept = [t.clone() for t in once]
    for t in twice:
        t.fill_(7)
    assert_same(once, kept)
    assert len({t.untyped_storage().data_ptr() for t in (*once, *twice, *tensors)}) == 10
    assert recorded() == 2


@pytest.mark.parametrize("which", range(4))
def test_a_lazily_negated_tensor(which: int, recorded: Callable[[], int]) -> None:
    """Its memory holds the opposite: the dispatcher resolves it, kernels would not."""
    layer = LAYERS["conv"]
    tensors = layer.tensors(HALF)
    wanted = pair_in_python(layer, tensors)
    tensors[which] = torch._neg_view(-tensors[which])
    assert_same(pair(layer, tensors), wanted)
    assert recorded() == 1


@pytest.mark.parametrize("number", range(4))
def test_results_are_no_part_of_a_graph(number: int, implementation: str) -> None:
    """Whether they are played, or would be an operator's of PyTorch."""
    layer = LAYERS["conv"]
    for _ in range(number + 1):
        tensors = [t.requires_grad_() for t in layer.tensors(HALF)]
        results = pair(layer, tensors)
    assert not any(t.requires_grad for t in results)


def test_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.0.0+elsewhere")
    assert "this is 2.0.0+elsewhere" in str(player.unavailable())


def test_training_is_the_same_to_the_last_bit(
    on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pairs and merges by csrc/replay and by Python."""

    def trained() -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(),
            nn.Linear(16 * 16, 10),
        )  # fmt: skip
        ghl.swap(model, "ghl", types=(nn.Conv2d, nn.Linear), exclude=())
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(6):
            with torch.autocast("cpu", HALF):
                loss = model(torch.randn(4, 3, 6, 6)).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    before = played("linear_pair"), played(), played("merge")
    weights = trained()
    assert (
        played("linear_pair") > before[0] and played() > before[1] and played("merge") > before[2]
    )
    monkeypatch.setattr(replay, "on_gpu", lambda t: False)
    player.forget()
    with player.paused():
        assert_same(trained(), weights)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_random_programs(data: st.DataObject) -> None:
    """Calls of random kinds in random order, against the operator in Python."""
    layers = [
        Conv(n, c * groups, (5, 4), k * groups, kernel, padding=(1, 0), groups=groups)
        for n in (1, 2) for c in (1, 3) for k in (2, 8) for kernel in ((1, 1), (3, 2))
        for groups in (1, 2)
    ]  # fmt: skip
    chosen = data.draw(st.lists(st.sampled_from(layers), min_size=1, max_size=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_tapes", {})
        patch.setattr(replay, "on_gpu", lambda t: True)
        patch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
        registered = player.serve("conv2d_pair_no_grad", "conv2d_pair", "CPU", True)
        for _ in range(8):
            layer = data.draw(st.sampled_from(chosen))
            layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
            dtype = data.draw(st.sampled_from([torch.float16, HALF, torch.float32]))
            tensors = [LAYOUTS[layout](t) for t in layer.tensors(dtype)]
            assert_same(pair(layer, tensors), pair_in_python(layer, tensors))
        player.forget()
        del registered
