"""A call that is written down and played for other tensors does what it would do for them."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest
import small_tiles as forms
import torch
from cases import LAYOUTS, Conv, Layer, Linear, choices, problem_of
from test_gpu_steps import assert_same
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ghl_kernels import Rule, dispatch, force, ops
from ghl_kernels.tapes import launches, player, tape
from ghl_kernels.tapes.recorder import record, recorder
from ghl_kernels.tuning.tiles import BY_CUDA, BY_TRITON

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
    compiled = player.made_of(taped, 0)
    if compiled is not None:
        assert_same(compiled.play(others), wanted)
    elif player.module() is not None:
        assert told in BY_TRITON and not torch.cuda.is_available()  # launches of its interpreter


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@layers
def test_on_a_gpu_tapes_launch_without_triton(
    layer: Layer, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a driver is given is compared without one: tests/compile."""
    skip_what_it_cannot(told, layer)
    if launches.compiled() is None:
        pytest.skip("the library of launches is not built")
    made: list[bool] = []

    def watched(kernel: launches.Kernel, arguments: Sequence[object]) -> launches.Launch:
        launch = launches.planned(kernel, arguments)
        assert launch is not None

        def watch(stream: int, addresses: Sequence[int]) -> bool:
            made.append(launch(stream, addresses))
            return made[-1]

        return watch

    monkeypatch.setattr(tape, "planned", watched)
    update, geometry = update_of(layer)
    rest = *geometry, *choices(Rule())
    first, others = half(layer), half(layer)
    wanted = update(*others, *rest)
    _, taped = record(update, first, *rest)
    assert_same(taped.play(others), wanted)
    assert all(made)
    assert made or told in BY_CUDA


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


def test_an_empty_view_of_a_tensor_that_is_not() -> None:
    """Its address is none."""
    a = torch.rand(3, 4)
    _, taped = record(lambda a: (a[1:1].T,), (a,))
    (result,) = taped.play((a,))
    assert result.shape == (4, 0) and 0 <= result.storage_offset() <= 12


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


def test_tables_of_addresses_are_not_played() -> None:
    """Triton's merge of many layers copies them to the GPU: another call's are others."""
    w = [torch.randn(4, 3), torch.randn(5, 2)]
    totals = [torch.rand(5), torch.rand(6)]
    with force("triton"):

        def merge(*tensors: Tensor) -> tuple[Tensor, ...]:
            lists = [list(tensors[i : i + 2]) for i in range(0, 8, 2)]
            return tuple(t for one in ops.foreach_merge(*lists, *choices(Rule())[2:]) for t in one)

        tensors = [*(torch.randn_like(t) for t in w), *(torch.randn_like(t) for t in w)]
        results, taped = record(merge, [*tensors, *totals, *w])
        assert taped is None
        assert_same(results, merge(*tensors, *totals, *w))
