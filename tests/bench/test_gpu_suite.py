"""The suite's stages: their times, what is written when they fail, and its exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import compile_ahead, stages, suite
from bench.stages import Running, Stage, Suite
from ghl.cli import main as ghl

ROOT = Path(__file__).parents[2]
MEASURED = {"schema": 1, "gpu": "NVIDIA H200", "summary": {"net_b2": {"vs_trick": 1.5}},
            "layers": [{"layer": "a"}]}  # fmt: skip


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def in_place_of_the_repository(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    for module in (suite, stages):
        monkeypatch.setattr(module, "ROOT", directory)


def run(tmp_path: Path, stages: list[Stage], monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict]:
    """The exit status and the JSON of a suite of these stages."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    in_place_of_the_repository(monkeypatch, tmp_path)
    monkeypatch.setattr(suite, "where", lambda: {"schema": 1, "gpu": "NVIDIA H200"})
    work = tmp_path / "build" / "gpu_suite"
    status = suite.main(["--seconds", "30"], lambda *_: stages)
    (path,) = (tmp_path / "out").glob("nvidia-h200.json")
    assert work.is_dir()
    return status, json.loads(path.read_text())


def writes_measured() -> tuple[str, ...]:
    return python(f"open('build/gpu_suite/measured.json', 'w').write({json.dumps(MEASURED)!r})")


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", ROOT / "bench" / "gpu_suite.sh"], check=True)


def test_all_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = "p/'cache/ghl_kernels/tables'; t.mkdir(parents=True); (t/'gpu.json').write_text('{}')"
    code = f"import pathlib; p=pathlib.Path('build/gpu_suite'); t={tables}"
    status, result = run(
        tmp_path,
        [Stage("tests", writes_measured(), 9), Stage("tune", python(code), 9)],
        monkeypatch,
    )
    assert status == 0
    assert result["checks_passed"]
    assert result["summary"] == {"net_b2": {"vs_trick": 1.5}}
    assert [(s["name"], s["ok"]) for s in result["stages"]] == [("tests", True), ("tune", True)]
    assert list(result)[-1] == "layers"
    assert (tmp_path / "out" / "table-gpu.json").read_text() == "{}"


def test_a_failed_check_fails_the_suite_and_later_stages_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [Stage("tests", python("print('what failed'); exit(3)"), 9),
              Stage("measure", writes_measured(), 9)]  # fmt: skip
    status, result = run(tmp_path, stages, monkeypatch)
    assert status == 1
    assert not result["checks_passed"]
    assert result["stages"][0]["how"] == "failed (3)"
    assert result["summary"]
    assert "what failed" in capsys.readouterr().out
    assert "what failed" in (tmp_path / "out" / "suite.log").read_text()


def test_a_stage_and_its_children_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    status, result = run(tmp_path, [Stage("measure", python(code), 1)], monkeypatch)
    assert time.monotonic() - start < 3
    assert status == 1
    assert result["stages"][0]["how"] == "stopped after 1 s"
    time.sleep(max(0.0, start + 4 - time.monotonic()))
    assert not late.exists()


def test_what_does_not_check_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [Stage("measure", writes_measured(), 9),
              Stage("first_update", ("/no/such/program",), 9, checks=False),
              Stage("train_step", (), 9, skipped="a dry run")]  # fmt: skip
    status, result = run(tmp_path, stages, monkeypatch)
    assert status == 0
    assert [s["ok"] for s in result["stages"]] == [True, False, None]
    assert "train_step" not in result["summary"]


def test_time_is_kept_for_later_stages(tmp_path: Path) -> None:
    given: list[int] = []
    with (tmp_path / "log").open("w") as log:
        here = Suite(tmp_path, tmp_path, time.monotonic() + 100, log)
        here.run_together = lambda stages, left: given.extend(  # type: ignore[method-assign]
            round(min(stage.seconds, left)) for stage in stages
        )
        here.run([Stage("a", (), 80), Stage("b", (), 80, 40), Stage("c", (), 500, 20),
                  Stage("d", (), 5, 10, skipped="no")])  # fmt: skip
    assert given == [40, 80, 100, 5]


def test_a_stage_is_told_to_end_before_it_is_stopped(tmp_path: Path) -> None:
    stage = Stage("a", python("import sys; print({1}, '{seconds}')"), 60)
    assert Running(stage, tmp_path, 60).outcome() == (0, "{1} 45\n")


def test_stages_beside_each_other_take_the_time_of_the_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [Stage(name, python(f"import time; time.sleep(2); exit({status})"), 9, beside="checks")
              for status, name in enumerate(("tests", "kernels", "sanitize"))]  # fmt: skip
    start = time.monotonic()
    status, result = run(tmp_path, stages, monkeypatch)
    assert time.monotonic() - start < 5.5  # and not six
    assert status == 1
    assert {s["name"]: s["how"] for s in result["stages"]} == {
        "tests": "ok", "kernels": "failed (1)", "sanitize": "failed (2)",
    }  # fmt: skip


def test_a_limit_holds_beside_a_stage_that_takes_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And durations are a stage's own."""
    limits = {"long": (3, 9), "over": (9, 1), "short": (0.1, 9)}
    stages = [
        Stage(name, python(f"import time; time.sleep({sleep})"), limit, beside="checks")
        for name, (sleep, limit) in limits.items()
    ]
    _, result = run(tmp_path, stages, monkeypatch)
    of = {stage["name"]: stage for stage in result["stages"]}
    assert of["over"]["how"] == "stopped after 1 s" and of["over"]["seconds"] < 2
    assert of["short"]["how"] == "ok" and of["short"]["seconds"] < 2.5


def test_a_stage_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--stages", "tests,tets"])
    assert "there is no stage tets" in capsys.readouterr().err


def test_results_are_replaced_by_measurements_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    in_place_of_the_repository(monkeypatch, tmp_path)
    monkeypatch.setattr(suite, "where", lambda: {"schema": 1, "gpu": "NVIDIA H200"})
    results = tmp_path / "bench" / "results"
    suite.main(["--seconds", "30"], lambda *_: [Stage("tests", python(""), 9)])
    assert not results.exists()
    suite.main(["--seconds", "30"], lambda *_: [Stage("measure", writes_measured(), 9)])
    assert (results / "nvidia-h200.json").exists()


def test_stages_that_are_not_run_again_keep_what_they_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same sources, and as long as not all is run again."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    in_place_of_the_repository(monkeypatch, tmp_path)
    monkeypatch.setattr(suite, "where", lambda: {"schema": 1, "gpu": "NVIDIA H200"})
    first = tmp_path / "build" / "gpu_suite" / "first.json"
    tests = Stage("tests", python("exit(1)"), 9)
    writes = python("import sys; open(sys.argv[1], 'w').write('{\"warm\": 7}')")
    stages = [tests, Stage("first_update", (*writes, str(first)), 9),
              Stage("measure", writes_measured(), 9)]  # fmt: skip

    def run(*words: str) -> tuple[int, dict[str, bool], dict]:
        status = suite.main(["--seconds", "30", *words], lambda *_: stages)
        result = json.loads((tmp_path / "out" / "nvidia-h200.json").read_text())
        return status, {s["name"]: s["ok"] for s in result["stages"]}, result["summary"]

    assert run("--stages", "tests,first_update")[:2] == (1, {"tests": False, "first_update": True})
    went = {"tests": False, "first_update": True, "measure": True}
    summary = {"net_b2": {"vs_trick": 1.5}, "first_update_seconds": {"warm": 7}}
    assert run("--stages", "measure") == (1, went, summary)
    stages[0] = Stage("tests", python(""), 9)
    assert run("--stages", "tests") == (0, went | {"tests": True}, summary)
    stages[1] = Stage("first_update", (*python("exit(1)"), str(first)), 9, checks=False)
    status, _, summary = run("--stages", "first_update")
    assert status == 0 and "first_update_seconds" not in summary
    monkeypatch.setattr(suite, "sources", lambda: "others")
    assert run("--stages", "tests") == (0, {"tests": True}, {})


def test_a_stage_may_begin_when_another_beside_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether that ran or was skipped; and from the start where it is no stage of this run."""
    long = python("import time; time.sleep(2)")
    group = [Stage("tests", long, 9, beside="checks"),
             Stage("kernels", (), 9, skipped="no", beside="checks"),
             Stage("slow", long, 9, beside="checks"),
             Stage("once", long, 9, beside="checks", after="tests"),
             Stage("soon", long, 9, beside="checks", after="kernels"),
             Stage("alone", long, 9, beside="checks", after="missing")]  # fmt: skip
    start = time.monotonic()
    status, result = run(tmp_path, group, monkeypatch)
    assert 4 <= time.monotonic() - start < 5.9
    assert status == 0
    took = {stage["name"]: stage["seconds"] for stage in result["stages"]}
    assert took.keys() == {"tests", "kernels", "slow", "once", "soon", "alone"}
    assert 2 <= took["once"] < 3


def timed(times: Path, gate: Path, ready: str = "") -> tuple[str, ...]:
    """Waits for its gate once it is ready, then writes when it went on and when it ended."""
    return python(
        f"import os, time; {ready}\n"
        f"open({str(gate.with_suffix('.ready'))!r}, 'w')\n"
        f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
        "begin = time.monotonic(); time.sleep(0.2)\n"
        f"open({str(times)!r}, 'a').write(f'{{begin}} {{time.monotonic()}}\\n')"
    )


@pytest.mark.parametrize("beside", [True, False], ids=["beside_others", "alone"])
def test_stages_with_gates_are_ready_early_and_timed_last(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other and once both are ready, whatever an earlier run has left."""
    times, gates = tmp_path / "times", [tmp_path / "a.gate", tmp_path / "b.gate"]
    ready = [tmp_path / "a.ready", tmp_path / "b.ready"]
    for file in (*gates, *ready):
        file.touch()
    noted = f"now = time.monotonic(); open({str(times)!r}, 'a').write(f'{{now}} {{now}}\\n')"
    waits = f"""import os, time
while not all(map(os.path.exists, {[*map(str, ready)]})): time.sleep(0.01)
time.sleep(0.3); {noted}"""
    warms = f"time.sleep(0.6); {noted}"
    stages = [
        Stage(name, timed(times, gate, busy), 20, beside="checks", gate=gate)
        for name, gate, busy in zip("ab", gates, ("", warms), strict=True)
    ]  # fmt: skip
    if beside:
        stages.append(Stage("tests", python(waits), 20, beside="checks"))
    status, result = run(tmp_path, stages, monkeypatch)
    assert status == 0
    assert [s["name"] for s in result["stages"]] == (["tests"] if beside else []) + ["a", "b"]
    moments = [float(word) for word in times.read_text().split()]
    assert len(moments) == 2 * (len(stages) + 1)  # and when the second had made itself ready
    assert moments == sorted(moments)


def test_the_limit_of_a_stage_holds_while_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, times = tmp_path / "gate", tmp_path / "times"
    stages = [Stage("tests", python("import time; time.sleep(2)"), 9, beside="checks"),
              Stage("late", timed(times, gate), 1, beside="checks", gate=gate)]  # fmt: skip
    _, result = run(tmp_path, stages, monkeypatch)
    assert {s["name"]: s["how"] for s in result["stages"]} == {
        "tests": "ok", "late": "stopped after 1 s",
    }  # fmt: skip
    assert not times.exists()


def test_stages_leave_time_to_those_that_are_timed_after_them(tmp_path: Path) -> None:
    gates = {"gate": tmp_path / "gate", "beside": "checks"}
    group = [Stage("tests", python(""), 90, 7, beside="checks"),
             Stage("a", python(""), 90, 10, **gates),
             Stage("skipped", (), 90, 40, skipped="no", **gates),
             Stage("b", python(""), 25, 30, **gates)]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        here = Suite(tmp_path, tmp_path, time.monotonic() + 100, log, scale=0.5)
        running = here.started(group, None, time.monotonic() + 60)
    given = {one.stage.name: round(one.seconds) for one in running}
    for one in running:
        one.stop()
    assert given == {"tests": 40, "a": 45, "b": 25}


# a worker's half of the tests, of which the first is told before the second is in its midst
SLOW = """import pathlib, time
def test_fails(): assert "what" == "failed"
def test_slow(): time.sleep(0.5); pathlib.Path("begun").touch(); time.sleep(0.5)
def test_slow_too(): time.sleep(1.5)
def test_nothing(): pass
"""


def test_pytest_says_what_failed_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With workers, of which one is in the midst of a test."""
    in_place_of_the_repository(monkeypatch, tmp_path)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    (tmp_path / "test_slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-n", "2", "test_slow.py"]
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    stage = Stage("tests", (*command, "--dist", "worksteal"), 60, environment=alone)
    one = Running(stage, tmp_path, 60)
    while not (tmp_path / "begun").exists() and not one.has_ended():
        time.sleep(0.01)
    one.seconds = 0
    with (tmp_path / "log").open("w") as log:
        here = Suite(tmp_path, tmp_path, time.monotonic() + 60, log)
        here.tell(one, *one.outcome())
    told = capsys.readouterr().out
    assert here.results[0]["how"] == "stopped after 0 s"
    for text in (told, (tmp_path / "log").read_text()):
        assert "FAILED test_slow.py::test_fails" in text
    assert "1 failed" in told.splitlines()[-1]


def test_processes_that_compile_ahead_share_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, str]] = []
    monkeypatch.setattr(compile_ahead, "compile_layer", lambda *layer: seen.append(layer))
    for part in "012":
        words = ["deephebb_b1", "deephebb_b2", "--device", "cpu"]
        words += ["--processes", "3", "--part", part]
        assert compile_ahead.main(words) == 0
    assert sorted(seen) == [(f"deephebb_b{b}", n, "cpu") for b in (1, 2) for n in range(3)]


def test_the_stages_are_those_of_the_issue(tmp_path: Path) -> None:
    stages = suite.stages(tmp_path, tmp_path, dry=False)
    assert [s.name for s in stages] == [
        "install", "tests", "kernels", "sanitize", "compile_layers", "train_step_compiled",
        "train_step_reduced", "tune", "first_update", "train_step", "train_step_captured",
        "monitor", "measure",
    ]  # fmt: skip
    assert sum(s.reserve for s in stages) < suite.SECONDS < 600
    assert max(s.seconds for s in stages if s.beside) < 200
    gated = {s.gate: s.command for s in stages if s.gate}
    assert len(gated) == 2
    for gate, command in gated.items():
        when = command.index("--when") + 1
        assert command[when : when + 2] == (str(gate.with_suffix(".ready")), str(gate))


@pytest.mark.parametrize("words", [["bench", "tune"], ["bench", "layers"]])
def test_without_a_gpu_one_line_says_so(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert ghl(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ghl: error: ")
    assert re.search("--device is 'cuda', but torch .* no GPU|tuned on a GPU, .* none here", line)
