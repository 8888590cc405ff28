"""The benchmark of a training step: it runs on a CPU, and reports nothing that is not the rule."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import natural, step_profile, train_step
from bench.train_step import Contestant
from ghl_kernels import dispatch

SMALL = ["--arch", "resnet20", "--width", "0.25", "--size", "16", "--batch-size", "4"]
SMALL += ["--device", "cpu", "--warmup", "1", "--steps", "3"]


@pytest.mark.parametrize("options", [[], ["--amp", "bf16", "--channels-last"]])
def test_reports_all_three(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "result.json"
    train_step.main([*SMALL, *options, "--out", str(path)])
    result = json.loads(path.read_text())
    assert [row["implementation"] for row in result["rows"]] == ["bp", "ghl", "natural"]
    for row in result["rows"]:
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["images_per_second"] == pytest.approx(4 / row["p50_ms"] * 1e3)
    assert result["settings"]["batch_size"] == 4
    bp, ghl, natural = result["rows"]
    assert result["ratios"] == pytest.approx(
        {
            "ghl_over_bp": ghl["p50_ms"] / bp["p50_ms"],
            "natural_over_bp": natural["p50_ms"] / bp["p50_ms"],
            "memory_over_bp": ghl["peak_bytes"] / bp["peak_bytes"],
        }
    )
    assert {"machine", "torch", "commit", "source_hash"} <= result.keys()


def test_what_is_left_out_is_not_reported(tmp_path: Path) -> None:
    """The natural layer still tells whether the updates are right."""
    path = tmp_path / "result.json"
    train_step.main([*SMALL, "--contestants", "ghl", "--out", str(path)])
    result = json.loads(path.read_text())
    assert [row["implementation"] for row in result["rows"]] == ["ghl"]
    assert result["ratios"] == {}


def test_waits_warm_until_it_may_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, gate, done = tmp_path / "result.json", tmp_path / "gate", []
    ready = tmp_path / "ready"

    def telling(what: str, call: Callable) -> Callable:
        return lambda *words: (done.append(what), call(*words))[1]

    step, peak, seconds = Contestant.step, train_step.peak_bytes, train_step.seconds_of
    monkeypatch.setattr(Contestant, "step", telling("step", step))
    monkeypatch.setattr(train_step, "peak_bytes", telling("peak", peak))
    monkeypatch.setattr(train_step, "seconds_of", telling("time", seconds))
    clock = {"perf_counter": time.perf_counter, "sleep": telling("wait", lambda _: gate.touch())}
    monkeypatch.setattr(train_step, "time", SimpleNamespace(**clock))
    words = ["--contestants", "bp", "synchronized", "--out", str(path)]
    words += ["--when", str(ready), str(gate)]
    train_step.main([*SMALL, *words])
    assert done[:5] == ["step", "step", "wait", "peak", "step"]
    assert (done.count("wait"), done.count("time")) == (1, 2 * 3)
    assert ready.exists() and "when" not in json.loads(path.read_text())["settings"]


def test_reports_nothing_of_operators_in_the_place_of_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "choose", lambda *of: dispatch.fall_back("composes", "a test"))
    with pytest.raises(UserWarning, match="ghl_kernels composes: a test"):
        train_step.main([*SMALL, "--out", str(path)])
    assert not path.exists()


@pytest.mark.parametrize("contestant", ["ghl", "synchronized"])
def test_reports_nothing_where_updates_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contestant: str
) -> None:
    monkeypatch.setattr(natural, "gate", lambda G, H: G)
    words = ["--contestants", "bp", contestant, "--out", str(tmp_path / "result.json")]
    with pytest.raises(RuntimeError, match=r"updates of conv1 differ by .*: nothing to time"):
        train_step.main([*SMALL, *words])
    assert not list(tmp_path.iterdir())


def test_a_graph_wants_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.main([*SMALL, "--graph"])
    assert "--graph: --device is cpu, must be cuda" in capsys.readouterr().err


def test_what_the_gpu_does_is_summed_by_kernel() -> None:
    def event(name: str, us: float, device: str = "CUDA") -> SimpleNamespace:
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, device_type=kind, self_device_time_total=us)

    steps = [event("short", 10), event("long", 300), event("long", 500), event("host", 9, "CPU")]
    found = step_profile.summary(steps * step_profile.STEPS)
    assert (found["gpu_ms"], found["gpu_launches"]) == (pytest.approx(0.81), 3)
    assert [(k["kernel"], k["launches"]) for k in found["gpu_kernels"]] == [
        ("long", 2),
        ("short", 1),
    ]
    assert [k["ms"] for k in found["gpu_kernels"]] == pytest.approx([0.8, 0.01])


def test_steps_in_a_row_are_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    ends = {"bp": iter([1.0, 3.0, 2.0, 2.0, 9.0]), "ghl": iter([4.0] * 5)}

    def seconds_of(call: Callable[[], None], device: str) -> train_step.Seconds:
        call()
        return train_step.Seconds(0.0, next(ends[done[-1]]))

    monkeypatch.setattr(train_step, "seconds_of", seconds_of)
    steps = {name: functools.partial(done.append, name) for name in ends}
    found = train_step.in_a_row(steps, "cuda")
    assert found == pytest.approx({"bp": 400, "ghl": 800})
    assert done == (["bp"] * 5 + ["ghl"] * 5) * 5
    rows = [
        {"implementation": name, "p50_ms": 1.0, "peak_bytes": None, "in_a_row_ms": ms}
        for name, ms in found.items()
    ]
    assert train_step.ratios(rows) == {"ghl_over_bp": 1.0, "ghl_over_bp_in_a_row": 2.0}


def test_a_mode_wants_a_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.main([*SMALL, "--mode", "reduce-overhead"])
    assert "--mode reduce-overhead: expected with --compile" in capsys.readouterr().err


def test_a_graphs_memory_is_no_figure(capsys: pytest.CaptureFixture[str]) -> None:
    options = train_step.parse(SMALL)
    times = [train_step.Seconds(0.1 * n, 0.2 * n) for n in (1, 2, 3)]
    rows = [train_step.row(name, times, None, options) for name in ("bp", "ghl")]
    assert (rows[0]["host_ms"], rows[0]["p50_ms"]) == pytest.approx((200, 400))
    assert train_step.ratios(rows) == {"ghl_over_bp": 1.0}
    train_step.print_table(rows)
    assert "ghl" in capsys.readouterr().out
