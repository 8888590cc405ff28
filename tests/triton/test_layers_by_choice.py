"""A training step of layers takes kernels by the dispatcher's own choice, trials and all.

Other tests force what runs, and what is forced is not tried. Without a GPU its choice is made for
the interpreter.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import ghl
from ghl_kernels import Backend, Problem, Rule, dispatch
from ghl_kernels.tuning import trial
from ghl_kernels.tuning.tiles import BY_CUDA, BY_TRITON

SUMS = {"conv2d_pair", "linear_pair"}
RULES = {
    "ghl": Rule(), "instar": Rule(decay="instar"), "mean": Rule(gate="hebb", normalize="mean"),
}  # fmt: skip


@pytest.fixture
def chosen_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_last", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    if torch.cuda.is_available():
        return

    def settled(operator: str, first: Tensor, problem: Problem | None) -> Backend:
        return dispatch.choose_on_gpu(operator, first, problem)

    monkeypatch.setattr(dispatch, "settled", settled)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "cuda_unavailable", lambda *of: "nothing is compiled")
    for name, size in (("BATCH", 2), ("SIZE", 5), ("WEIGHT", (9, 5, 3, 3))):
        monkeypatch.setattr(trial, name, size)


@pytest.mark.parametrize("synchronized", [False, True], ids=["in backward", "synchronized"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_layers_take_kernels(
    rule: Rule, dtype: torch.dtype, synchronized: bool, chosen_as_on_a_gpu: None
) -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 9, 16)
    )
    ghl.swap(model.to(dtype), rule, types=(nn.Conv2d, nn.Linear), exclude=())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    if synchronized:
        ghl.synchronize(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ghl_kernels ")  # told of a trial that failed
        model(torch.randn(2, 8, 5, 5, dtype=dtype)).square().mean().backward()
        optimizer.step()
    merges = "foreach_merge" if synchronized else "merge"
    took = {operator: dispatch.last(operator) for operator in (*SUMS, merges)}
    assert {backend and backend.name for backend in took.values()} <= {*BY_TRITON, *BY_CUDA}
    assert all(p.isfinite().all() for p in model.parameters())
