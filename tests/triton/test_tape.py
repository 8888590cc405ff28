"""A call that is written down and played for other tensors does what it would do for them."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import small_tiles as forms
import torch
from cases import LAYOUTS, Conv, Layer, Linear, Tensors, choices, problem_of
from test_gpu import gpu
from test_gpu_steps import assert_same
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import ghl_kernels
from ghl_kernels import Backend, Rule, dispatch, ops, replay, tape, trial
from ghl_kernels.recorder import record, recorder
from ghl_kernels.tiles import BY_CUDA, BY_TRITON

LAYERS: dict[str, Layer] = {
    "linear": Linear(24, 18, 10),
    "pointwise": Conv(2, 16, (3, 4), 8, kernel=(1, 1)),
    "conv": Conv(1, 8, (4, 5), 8, kernel=(1, 3), padding=(0, 1)),
    "strided": Conv(2, 8, (7, 6), 8, kernel=(1, 1), stride=(2, 2)),
    "few_channels": Conv(1, 3, (7, 6), 8, stride=(2, 2), padding=(1, 1)),
    "depthwise": Conv(1, 8, (4, 5), 8, kernel=(1, 3), groups=8),
}
DESCRIBED = dataclasses.replace(forms.WHOLE_ROWS_SPLIT, descriptors=True)
FORMS = [(forms.MANY_SPLITS, Rule()), (DESCRIBED, Rule("hard", 0.5, "instar", "hebb"))]
IMPLEMENTATIONS = (*BY_TRITON, *BY_CUDA) if torch.cuda.is_available() else (*BY_TRITON, "composed")
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def half(layer: Layer) -> list[Tensor]:
    """Activations of 16 bits in channels_last, where they can be, and a weight of 32."""
    x, y, g, w = (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        for t in layer.tensors()
    )
    return [x.half(), y.half(), g.half(), w]


def update_of(layer: Layer) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[object, ...]]:
    """The operator in Python, and its arguments behind the tensors, without the rule."""
    if isinstance(layer, Linear):
        return ops.linear_update, ()
    return ops.conv2d_update, layer.geometry


@pytest.fixture(params=IMPLEMENTATIONS)
def told(
    request: pytest.FixtureRequest, forced: Callable, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Forces each implementation that there is, and the same sums of cuDNN's each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if reason := dispatch.unavailable(request.param, torch.empty(0, dtype=torch.float16), None):
        pytest.skip(reason)
    with forced(request.param):
        yield request.param


def skip_what_it_cannot(name: str, layer: Layer) -> None:
    x = half(layer)[0]
    if reason := dispatch.unavailable(name, x, problem_of(layer, x.dtype)):
        # the fixture wants an operator to have run
        LAYERS["linear"].update(half(LAYERS["linear"]), Rule())
        pytest.skip(reason)


@layers
@pytest.mark.parametrize(("form", "rule"), FORMS, ids=["tiles", "rows"])
def test_other_tensors_are_given_what_the_call_would(
    layer: Layer, form: forms.Form, rule: Rule, told: str, use: Callable
) -> None:
    skip_what_it_cannot(told, layer)
    use(form)
    update, geometry = update_of(layer)
    first, others = half(layer), half(layer)
    rest = *geometry, *choices(rule)
    wanted = update(*others, *rest)
    _, taped = record(update, first, *rest)
    assert taped is not None
    assert_same(taped.play(others), wanted)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_activations_that_are_copied_first(layout: str, told: str) -> None:
    layer = LAYERS["conv"]
    first, others = ([LAYOUTS[layout](t) for t in layer.tensors(torch.float16)] for _ in range(2))
    rest = layer.geometry, choices(Rule())
    result, taped = record(ops.conv2d_update, first, *rest[0], *rest[1])
    assert taped is not None
    assert_same(taped.play(others), ops.conv2d_update(*others, *rest[0], *rest[1]))
    assert_same(taped.play(first), result)


def test_what_is_played_has_memory_of_its_own(told: str) -> None:
    layer, tensors = LAYERS["conv"], half(LAYERS["conv"])
    _, taped = record(ops.conv2d_update, tensors, *layer.geometry, *choices(Rule()))
    once, twice = taped.play(tensors), taped.play(half(layer))
    kept = [t.clone() for t in once]
    for t in twice:
        t.fill_(7)
    assert_same(once, kept)
    places = {t.untyped_storage().data_ptr() for t in (*once, *twice, *tensors)}
    assert len(places) == 10


def test_a_tape_keeps_no_tensor_alive(told: str, use: Callable) -> None:
    use(DESCRIBED)
    layer = LAYERS["pointwise"]
    tensors = half(layer)
    recorders: list[weakref.ref] = []

    def call(*arguments: object) -> tuple[Tensor, ...]:
        recorders.append(weakref.ref(recorder()))
        return ops.conv2d_update(*arguments)

    result, taped = record(call, tensors, *layer.geometry, *choices(Rule()))
    wanted = [t.clone() for t in result]
    memory = [StorageWeakRef(t.untyped_storage()) for t in (*tensors, *result)]
    del tensors, result
    gc.collect()
    assert taped is not None and recorders[0]() is None
    assert all(one.expired() for one in memory)
    torch.manual_seed(0)
    assert_same(taped.play(half(layer)), wanted)


def test_steps_that_nobody_wants_are_left_out() -> None:
    def call(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        torch.sin(a)
        room = torch.empty_like(a)
        room.detach().copy_(b)
        left, right = (a + b).split(2)
        return room.view(2, 2), right.mul_(2) + left

    a, b = torch.rand(2, 4)
    result, taped = record(call, (a, b))
    assert_same(taped.play((a, b)), result)
    assert_same(taped.play((b, a)), call(b, a))
    assert len(taped.plays) == 7  # empty, copy, +, split, view, mul_, +


def test_large_memory_is_given_back_when_it_was_last_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "SMALL", 64)
    alive: list[int] = []

    def call(a: Tensor) -> tuple[Tensor]:
        total = a[:2].clone()
        for _ in range(5):
            total = total + (a * 2).exp()[:2]
        return (total,)

    a = torch.rand(64)
    result, taped = record(call, (a,))
    slots: list[object] = [a, *[None] * (taped.slots - 1)]
    for play in taped.plays:
        play(slots)
        memory = [t.untyped_storage() for t in slots[1:] if isinstance(t, Tensor)]
        alive.append(len({m.data_ptr() for m in memory if m.nbytes() >= 64}))
    assert max(alive) <= 2
    assert torch.equal(slots[taped.outputs[0]], result[0])


ELSEWHERE = torch.rand(3)
UNPLAYABLE: dict[str, Callable[[Tensor], tuple[Tensor]]] = {
    "a tensor from elsewhere": lambda a: (a + ELSEWHERE,),
    "as a result": lambda a: (ELSEWHERE,),
    "a number that is read": lambda a: (a * float(a.max()),),
    "a comparison": lambda a: (a if a.equal(2 * a) else a + 1,),
    "a size that numbers make": lambda a: (a.nonzero(),),
    "random numbers": lambda a: (torch.rand_like(a) * 0 + a,),
    "memory": lambda a: (torch.empty(0, device=a.device).set_(a.untyped_storage()).clone(),),
}


@pytest.mark.parametrize("call", UNPLAYABLE.values(), ids=UNPLAYABLE)
def test_what_depends_on_more_than_how_tensors_lie_is_not_played(
    call: Callable[[Tensor], tuple[Tensor]],
) -> None:
    a = torch.ones(3, device=ELSEWHERE.device)
    result, taped = record(call, (a,))
    assert taped is None
    assert torch.equal(result[0], call(a)[0])


def test_two_inputs_that_are_one() -> None:
    a = torch.rand(3)
    result, taped = record(lambda a, b: (a + b,), (a, a))
    assert taped is None
    assert torch.equal(result[0], 2 * a)


def test_too_little_memory_to_record() -> None:
    calls = []

    def call(a: Tensor) -> tuple[Tensor]:
        calls.append(recorder() is not None)
        if recorder() is not None:
            raise torch.OutOfMemoryError("nothing left")
        return (a + 1,)

    result, taped = record(call, (torch.zeros(2),))
    assert (calls, taped) == ([True, False], None)
    assert torch.equal(result[0], torch.ones(2))


def test_what_others_do_meanwhile_is_done() -> None:
    """In a finalizer, say; it spoils the tape."""
    elsewhere = torch.zeros(2)

    def call(a: Tensor) -> tuple[Tensor]:
        elsewhere.add_(1)
        return (a + 1,)

    _, taped = record(call, (torch.zeros(2),))
    assert taped is None and torch.equal(elsewhere, torch.ones(2))


def test_a_recorder_inside_another_gives_it_back() -> None:
    def outer(a: Tensor) -> tuple[Tensor]:
        before = recorder()
        assert record(lambda b: (b * 2,), (a,))[1] is not None
        assert recorder() is before is not None
        return (a + 1,)

    record(outer, (torch.zeros(2),))
    assert recorder() is None


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, use: Callable) -> dict:
    """Operators replay their calls here too; the tapes that there are."""
    tapes: dict = {}
    monkeypatch.setattr(replay, "_tapes", tapes)
    monkeypatch.setattr(replay, "on_gpu", lambda t: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    return tapes


@layers
def test_the_third_call_of_a_kind_is_played(layer: Layer, played: dict) -> None:
    for number in range(4):
        tensors = half(layer)
        results = layer.update(tensors, Rule())
        (found,) = played.values()
        assert isinstance(found, Backend) if number == 0 else isinstance(found[0], tape.Tape)
        played_before = dict(played)
        played.clear()
        assert_same(results, layer.update(tensors, Rule()))  # as called for the first time
        played.clear()
        played.update(played_before)


def test_calls_that_differ_are_not_one_kind(played: dict) -> None:
    layer = LAYERS["conv"]
    x, y, g, w = half(layer)
    kinds = [
        (x, y, g, w), (x, y, g, w.half()), (x.float(), y.float(), g.float(), w),
        (x.contiguous(), y, g, w), (x, y.contiguous(), g, w), (x, y, g, w.contiguous()),
    ]  # fmt: skip
    for tensors in kinds:
        layer.update(tensors, Rule())
    for rule in (Rule("hard"), Rule("linear", decay="none"), Rule(tau=0.5)):
        layer.update(kinds[0], rule)
    layer.pair(kinds[0], Rule())
    dataclasses.replace(layer, padding=(0, 0)).update(
        half(dataclasses.replace(layer, padding=(0, 0))), Rule()
    )
    assert all(isinstance(found, Backend) for found in played.values()) and len(played) == 11
    dispatch.unsettle()
    layer.update(kinds[0], Rule())
    assert len(played) == 12


def test_one_tensor_as_two_arguments(played: dict) -> None:
    """Is no call to record, since others' are two; what was recorded plays for it as well."""
    layer = LAYERS["linear"]
    x, y, g, w = half(layer)
    for _ in range(3):
        twice = layer.update((x, y, y, w), Rule())
    assert [type(found) for found in played.values()] == [Backend]
    layer.update((x, y, g, w), Rule())
    ((recorded, _),) = played.values()
    assert isinstance(recorded, tape.Tape)
    assert_same(layer.update((x, y, y, w), Rule()), twice)


def test_what_is_forced_is_not_played(played: dict) -> None:
    layer = LAYERS["linear"]
    with ghl_kernels.force("composed"):
        for _ in range(3):
            layer.update(half(layer), Rule())
    assert not played


def test_what_was_forced_meanwhile_is_not_kept(
    played: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread; nor what a trial found no memory for. Calls to come are recorded again,
    but not every one of them."""
    layer, settled = LAYERS["linear"], dispatch.settled
    forced, passing = Backend("composed", "forced"), Backend("composed", trial.PASSING)
    for other, left in ((forced, [Backend]), (passing, [])):
        layer.update(half(layer), Rule())
        monkeypatch.setattr(dispatch, "settled", lambda *_, other=other: other)
        layer.update(half(layer), Rule())
        assert [type(found) for found in played.values()] == left
        monkeypatch.setattr(dispatch, "settled", settled)
    for _ in range(3):
        layer.update(half(layer), Rule())
    assert [type(found) for found in played.values()] == [tuple]


def test_threads_do_not_take_each_others_choices(
    played: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd has one for every device; another one's call may end between this one's."""
    layer, settled = LAYERS["linear"], dispatch.settled_last

    def meanwhile(operator: str) -> Backend | None:
        elsewhere = threading.Thread(target=dispatch.note, args=(operator, Backend("x", "there")))
        elsewhere.start()
        elsewhere.join()
        return settled(operator)

    monkeypatch.setattr(dispatch, "settled_last", meanwhile)
    for _ in range(3):
        layer.update(half(layer), Rule())
    ((_, backend),) = played.values()
    assert backend.reason != "there"


def test_an_error_is_told_each_time(played: dict) -> None:
    x, y, g, w = half(LAYERS["linear"])
    for _ in range(4):
        with pytest.raises(ValueError, match="g has shape"):
            LAYERS["linear"].update((x, y, g[1:], w), Rule())
        with pytest.raises(TypeError, match="g has layout"):
            LAYERS["linear"].update((x, y, g.to_sparse(), w), Rule())
    assert recorder() is None


def test_the_implementation_that_ran_is_told(played: dict) -> None:
    layer = LAYERS["linear"]
    for _ in range(3):
        layer.update(half(layer), Rule())
    ran = ghl_kernels.last("linear_update")
    layer.update(half(dataclasses.replace(layer, rows=0)), Rule())
    layer.update(half(layer), Rule())
    assert ghl_kernels.last("linear_update") is ran


def test_tapes_are_not_collected_without_end(played: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_TAPES", 3)
    for rows in range(1, 8):
        LAYERS["linear"].update(half(Linear(rows, 5, 4)), Rule())
    assert len(played) <= 3


def test_threads_play_one_tape_beside_each_other(played: dict) -> None:
    layer = LAYERS["conv"]
    mine = [half(layer) for _ in range(4)]
    wanted = [layer.update(tensors, Rule()) for tensors in mine]
    found: dict[int, list] = {}

    def work(number: int) -> None:
        found[number] = [layer.update(mine[number], Rule()) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in found.items():
        for result in results:
            assert_same(result, wanted[number])


@gpu
def test_calls_are_played_on_any_stream_and_in_a_graph(shipped: None) -> None:
    """Of a step of training: a pair and its merge, by the kernels that users get."""
    layer = Conv(16, 64, (28, 28), 64, padding=(1, 1))
    choice = "oja", "sign", "absmax"

    def step(tensors: Tensors) -> list[Tensor]:
        pair = layer.pair(tensors, Rule())
        return [*pair, *torch.ops.ghl_kernels.merge(*pair, tensors[3], *choice)]

    tensors = half(layer)
    wanted = step(tensors)
    step(half(layer))
    kinds = [found for found in replay._tapes.values() if isinstance(found, tuple)]
    assert len(kinds) >= 2
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_same(step(tensors), wanted)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors)
    for seed in range(3):
        torch.manual_seed(seed)
        for old, new in zip(tensors, half(layer), strict=True):
            old.copy_(new)
        graph.replay()
        assert_same(captured, step(tensors))
