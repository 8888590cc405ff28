"""A tape that csrc/replay plays does what the same tape does in Python. Launches: tests/compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_player import assert_same
from torch import Tensor

from ghl_kernels.tapes import player, tape
from ghl_kernels.tapes.recorder import record

pytestmark = pytest.mark.skipif(player.module() is None, reason="csrc/replay is not built for this")

STEPS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "lists": lambda a, b: (torch.cat([a, b, a]), *torch.stack([a, b]).unbind()),
    "a list of results": lambda a, b: tuple(torch._foreach_add([a, b], 2.5)),
    "in place": lambda a, b: (a.clone().add_(b, alpha=3).clamp_(min=None, max=1.0),),
    "named, with dtypes": lambda a, b: (a.sum(1, dtype=torch.float64), torch.full_like(b, 3)),
    "views of views": lambda a, b: (a.movedim(0, 1)[1:].unsqueeze(-1).clone() + b[0, 0],),
    "views of what is made": lambda a, b: ((a + b).T[1].contiguous(),),
    "no tensor for one": lambda a, b: torch.ops.aten.native_layer_norm(a, [3], None, None, 1e-5),
    "booleans": lambda a, b: torch.ops.aten.convolution_backward(
        a[None, None], b[None, None], a[:1, :1, None, None], None, [1, 1], [0, 0], [1, 1], False,
        [0, 0], 1, [True, True, False],
    )[:2],
}  # fmt: skip


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_operators_of_every_form(steps: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> None:
    first, others = torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    _, taped = record(steps, [*first])
    made = player.made_of(taped, 0)
    for a, b in (others, others[:, :, :].flip(0), torch.randn(4, 2, 3)[1:3]):
        assert_same(taped.play([a, b]), steps(a, b))
        assert_same(made.play([a, b]), steps(a, b))


def test_what_is_released_is_gone() -> None:
    taped = tape.Tape([], [torch.zeros(2)], 1, [0])
    use = tape.Step(torch.ops.aten.add.Tensor, [tape.Slot(1), tape.Slot(0)], {}, (1,))
    made = tape.Allocation.like(1, torch.zeros(2))
    taped.instructions = [made, use]
    player.made_of(taped, 0).play([torch.zeros(2)])
    taped.instructions = [made, tape.Release([1]), use]
    with pytest.raises(RuntimeError, match=r"None|undefined"):
        player.made_of(taped, 0).play([torch.zeros(2)])


def test_a_tape_without_an_operator_is_played_by_python() -> None:
    step = tape.Step(lambda a: a.add_(1), [tape.Slot(0)], {})
    assert player.made_of(tape.Tape([step], [torch.zeros(2)], 1, [0]), 0) is None


def test_an_error_in_a_tape_is_that_of_its_operator() -> None:
    _, taped = record(lambda a, b: (a @ b,), (torch.ones(2, 3), torch.ones(3, 2)))
    made = player.made_of(taped, 0)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        made.play([torch.ones(2, 3), torch.ones(2, 3)])
