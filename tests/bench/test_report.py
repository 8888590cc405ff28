"""Where a measurement says that it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ghl.bench import command, report
from ghl.cli import main as ghl


def test_the_commit_is_what_a_copy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose git may be another commit's."""
    monkeypatch.setenv("GHL_COMMIT", "a1b2")
    assert report.commit() == ("a1b2", None)
    monkeypatch.delenv("GHL_COMMIT")
    monkeypatch.setattr(report, "command", lambda *words: None)
    assert report.commit() == ("unknown", None)


def test_a_run_goes_on_with_the_file_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, told = tmp_path / "layers.json", []

    def measured(bench, workloads, done, earlier, modes):
        assert modes == ["tf32"]
        told.append((bench.ceilings.bytes_per_second, [*earlier]))
        return [{"workload": "a", "layer": "b", "implementation": "c", "mode": "d"}], ["a"]

    monkeypatch.setattr(command, "measure", measured)
    monkeypatch.setattr(command, "print_report", lambda *_: None)
    words = ["bench", "layers", "deephebb_b1", "--device", "cpu", "--out", str(file)]
    words += ["--modes", "tf32"]
    assert ghl(words) == 0
    assert ghl([*words, "--resume"]) == 0
    (rate, rows), again = told
    assert rows == [] and again == (rate, json.loads(file.read_text())["layers"])
    assert ghl(words) == 0
    assert told[2][1] == []


@pytest.mark.parametrize(
    ("what", "mode", "known"),
    [
        ("layers", "tf3", "bfloat16, float32, tf32"),
        ("tune", "float32", "bfloat16, tf32"),  # a table has no entries of it
    ],
)
def test_a_mode_that_is_not_known(
    what: str,
    mode: str,
    known: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "device_of", lambda name: torch.device("cpu"))
    assert ghl(["bench", what, "deephebb_b1", "--modes", "bfloat16", mode]) == 2
    assert f"--modes is '{mode}', must be one of {known};" in capsys.readouterr().err


def test_to_go_on_wants_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert ghl(["bench", "layers", "deephebb_b1", "--device", "cpu", "--resume"]) == 2
    assert "--resume: expected with --out FILE" in capsys.readouterr().err


@pytest.mark.parametrize("key", report.OF_THE_SAME)
def test_another_machines_file_is_not_gone_on_with(key: str, tmp_path: Path) -> None:
    here = report.provenance(torch.device("cpu"))
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(here))
    assert report.resumed(file, here) == here
    assert report.resumed(file, {**here, key: "another"}) == {}
    for broken in ("", "[]", "{"):
        file.write_text(broken)
        assert report.resumed(file, here) == {}
    assert report.resumed(tmp_path / "none", here) == {}
