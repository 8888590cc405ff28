"""What a GPU does before it takes a kernel: it tries it, and does without one that is not right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from small_tiles import ONE_TILE, Form

from ghl_kernels import Problem
from ghl_kernels.dispatch import IMPLEMENTATIONS
from ghl_kernels.pairs import Task
from ghl_kernels.splits import Partials
from ghl_kernels.triton import conv_wgrad, fused
from ghl_kernels.tuning import tiles, trial

FLOAT = torch.float32
PROBLEMS = {
    "linear": Problem(1, 20, 33, FLOAT, linear=True),
    "linear_sums": Problem(1, 20, 33, FLOAT, linear=True, competition="hard", sum_u=True),
    "conv": Problem(1, 18, 20, FLOAT, (3, 3), padding=(1, 1)),
    "conv_dilated": Problem(1, 18, 20, FLOAT, (3, 2), (2, 1), dilation=(2, 3), channels_last=True),
    "padded": Problem(1, 5, 16, FLOAT, (1, 1), padding=(1, 1)),
    "conv_sums": Problem(1, 5, 16, FLOAT, (1, 2), competition="softhebb", sum_u=True),
    "conv_uncounted": Problem(1, 5, 16, FLOAT, (1, 2), counted=False),
    "linear_uncounted": Problem(1, 20, 33, FLOAT, linear=True, counted=False),
    "packed": Problem(1, 9, 3, FLOAT, (3, 3), padding=(1, 1)),
    "groups": Problem(1, 6, 20, torch.float16, (3, 3), groups=2),
    "depthwise": Problem(1, 2, 1, FLOAT, (3, 3), groups=9, padding=(1, 1)),
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch, use: Callable[[Form], None]) -> None:
    monkeypatch.setattr(trial, "BATCH", 2)
    monkeypatch.setattr(trial, "SIZE", 5)
    monkeypatch.setattr(trial, "WEIGHT", (9, 5, 3, 3))
    use(ONE_TILE)


@pytest.mark.parametrize("strategy", tiles.BY_TRITON)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_right_is_taken(problem: Problem, strategy: str, device: torch.device) -> None:
    assert trial.disagreement(problem, device, IMPLEMENTATIONS[strategy], merged=True) is None


@pytest.mark.parametrize("strategy", tiles.BY_TRITON)
@pytest.mark.parametrize("operator", ["merge", "logsumexp"])
def test_right_sums_are_taken(operator: str, strategy: str, device: torch.device) -> None:
    assert trial.disagreement_of_sums(device, IMPLEMENTATIONS[strategy], operator) is None


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_what_others_have_as_default_dtype_is_not_tried(
    default: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds, merge = set(), fused.merge

    def noted(*sums: torch.Tensor, **named: object) -> object:
        kinds.update(t.dtype for t in sums if isinstance(t, torch.Tensor))
        return merge(*sums, **named)

    monkeypatch.setattr(fused, "merge", noted)
    torch.set_default_dtype(default)
    try:
        assert trial.disagreement_of_sums(device, IMPLEMENTATIONS["triton"], "merge") is None
        assert trial.disagreement(PROBLEMS["linear"], device, IMPLEMENTATIONS["triton"]) is None
    finally:
        torch.set_default_dtype(torch.float32)
    assert kinds == {torch.float32}


def test_the_batch_has_the_layers_layout(device: torch.device) -> None:
    """The memory order of the weight is a kernel of its own; the geometry is the layer's."""
    problem, (x, y, _, w) = trial.small_batch(PROBLEMS["conv_dilated"], device)
    assert w.is_contiguous(memory_format=torch.channels_last) and w.shape == (18, 20, 3, 2)
    assert (problem.stride, problem.padding, problem.dilation) == ((2, 1), (0, 0), (2, 3))
    wanted = torch.nn.functional.conv2d(x, w, None, (2, 1), 0, (2, 3)).shape
    assert y.shape == wanted
    _, (*_, w) = trial.small_batch(PROBLEMS["conv"], device)
    assert w.is_contiguous()
    assert not trial.small_batch(PROBLEMS["padded"], device)[0].pointwise


def test_what_computes_something_else_is_not_taken(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel with another temperature, say."""
    statistics, scale = conv_wgrad.statistics, conv_wgrad.exponent_scale
    monkeypatch.setattr(conv_wgrad, "statistics", lambda y, rule, tau: statistics(y, rule, tau / 2))
    monkeypatch.setattr(conv_wgrad, "exponent_scale", lambda tau: scale(tau / 2))
    found = trial.disagreement(PROBLEMS["conv"], device, IMPLEMENTATIONS["triton"])
    assert found is not None and "is off from PyTorch's operators by" in found


def test_an_update_is_tried_with_its_merge(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no such instruction")

    problem, triton_fused = PROBLEMS["linear"], IMPLEMENTATIONS["triton"]
    merge = fused.merge
    monkeypatch.setattr(fused, "merge", lambda G, H0, *rest: merge(H0, G, *rest))
    found = trial.disagreement(problem, device, triton_fused, merged=True)
    assert found == f"a trial of merge by {triton_fused} is off from PyTorch's operators"
    monkeypatch.setattr(fused, "merge", fail)
    assert trial.disagreement(problem, device, triton_fused) is None
    assert "no such instruction" in (trial.disagreement(problem, device, triton_fused, True) or "")


def test_wrong_sums_of_u_are_found_where_they_are_asked_for(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    convolve = fused.conv_wgrad

    def wrong(task: Task, partials: Partials) -> None:
        convolve(task, partials)
        partials.sums.totals[:3] += 3

    monkeypatch.setattr(fused, "conv_wgrad", wrong)
    found = trial.disagreement(PROBLEMS["conv_sums"], device, IMPLEMENTATIONS["triton"])
    assert found is not None and "(sums of u)" in found
    alone = dataclasses.replace(PROBLEMS["conv_sums"], sum_u=False)
    assert trial.disagreement(alone, device, IMPLEMENTATIONS["triton"]) is None


def test_what_does_not_run_is_not_taken(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no such instruction\nand much more")

    monkeypatch.setattr(fused, "conv_wgrad", fail)
    monkeypatch.setattr(fused, "merge", fail)
    found = trial.disagreement(PROBLEMS["conv"], device, IMPLEMENTATIONS["triton"])
    assert found is not None and found.startswith("a trial of ghl_kernels.triton.fused raised")
    assert "\n" not in found
    found = trial.disagreement_of_sums(device, IMPLEMENTATIONS["triton"], "merge")
    assert found is not None and found.startswith("a trial of merge by ghl_kernels.triton.fused ra")


def test_a_lack_of_memory_is_not_remembered(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("none left")

    problem = PROBLEMS["padded"]
    entry = tiles.choose(problem, device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    trial.remembered.cache_clear()
    with monkeypatch.context() as short:
        short.setattr(fused, "conv_wgrad", fail)
        found = trial.failure(problem, entry, device, IMPLEMENTATIONS["triton"])
    assert found == "a trial of ghl_kernels.triton.fused found too little memory"
    assert trial.failure(problem, entry, device, IMPLEMENTATIONS["triton"]) is None


def test_nor_is_it_of_sums(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    trial.remembered_of_sums.cache_clear()
    with monkeypatch.context() as short:
        short.setattr(fused, "merge", fail)
        found = trial.failure_of_sums(device, IMPLEMENTATIONS["triton"], "merge")
    assert found == "a trial of merge by ghl_kernels.triton.fused found too little memory"
    assert trial.failure_of_sums(device, IMPLEMENTATIONS["triton"], "merge") is None


def test_nothing_is_tried_in_a_capture(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = PROBLEMS["linear"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert trial.failure(problem, tiles.choose(problem, device), device, "no such module") is None
    assert trial.failure_of_sums(device, "no such module", "merge") is None
