"""The benchmark of the Monitor on networks of a moment, and that the GPU's suite takes it along."""

import json

import torch
from torch import nn

from bench import alignment_overhead, suite


def test_ratios_of_every_variant(tmp_path, monkeypatch, capsys):
    def tiny():
        return nn.Sequential(nn.Linear(4, 12)), torch.randn(8, 4)

    monkeypatch.setitem(alignment_overhead.CASES, "cpu", {"tiny": tiny})
    monkeypatch.setattr(alignment_overhead, "BLOCK", 2)
    threads = torch.get_num_threads()
    assert alignment_overhead.main(["--out", str(tmp_path / "ratios.json")]) == 0
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "ratios.json").read_text())["tiny"]
    assert list(found) == ["every step, batch", "every step, both", "every 50 steps, both"]
    assert found["every step, both"] > 1, "a step of so small a network is mostly measuring"
    assert "every step, both" in capsys.readouterr().out


def test_the_suite_measures_it_on_a_gpu(tmp_path):
    (stage,) = [s for s in suite.stages(tmp_path, tmp_path, False) if s.name == "monitor"]
    assert "bench.alignment_overhead" in stage.command and "cuda" in stage.command
    (tmp_path / "monitor.json").write_text('{"net": {"every step": 1.2}}')
    with (tmp_path / "log").open("w") as log:
        result = suite.assemble(suite.Suite(tmp_path, tmp_path, 0.0, log))
    assert result["summary"]["monitor"] == {"net": {"every step": 1.2}}
