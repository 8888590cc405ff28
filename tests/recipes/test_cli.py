"""The command line: its sub-commands, and one clear line for every bad input."""

import os
import subprocess
import sys

import pytest
import torch

from ghl.cli import main
from ghl.recipes.config import Config

SMALL = ["--width", "0.05", "--epochs", "1", "--limit-train", "128", "--limit-test", "64"]


def run(*words):
    return main([str(word) for word in words])


def test_train_then_eval(tmp_path, capsys):
    assert run("train", *SMALL, "--out", tmp_path / "run") == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert run("eval", tmp_path / "run") == 0
    assert capsys.readouterr().out == f"epoch 1: test accuracy {row[5]} %, test loss {row[4]}\n"


def test_help_tells_what_is_not_given(capsys):
    with pytest.raises(SystemExit):
        run("train", "--help")
    told = " ".join(capsys.readouterr().out.split())
    for option in ("--epochs EPOCHS passes over the training images (100)", "layers (0.005)"):
        assert option in told


def test_default_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", *SMALL, "--rule", "bp") == 0
    assert (tmp_path / "runs" / "digits-deephebb-bp" / "checkpoint.pt").exists()


def test_several_rules_are_compared(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("train", *SMALL, "--rule", "ghl", "sign", "--out", out) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in table] == ["rule", "ghl", "sign"]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "ghl" / "metrics.csv").exists()
    assert (out / "sign" / "metrics.csv").exists()


def test_a_comparison_is_resumed_with_nothing_but_its_rules(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    rules = ["--rule", "ghl", "sign", "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", interrupted)
        assert run("train", *SMALL, *rules) == 130
    assert Config.load(tmp_path / "sign" / "config.json").limit_train == 128
    assert run("train", *rules, "--resume") == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        ["ghl", "1"], ["sign", "1"],
    ]  # fmt: skip


def test_several_rules_are_checked_before_the_first_is_trained(tmp_path, capsys):
    assert run("train", *SMALL, "--rule", "ghl", "sing", "--out", tmp_path / "out") == 2
    assert "did you mean 'sign'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "deephep"], "--arch is 'deephep', must be one of"),
        (["--rule", "hebbian"], "--rule is 'hebbian', must be one of ghl, hebb, sign, bp"),
        (["--data", "mnist"], "--data is 'mnist', must be one of"),
        (["--tau", "0"], "--tau 0.0: expected a finite number above 0"),
        (["--tau", "nan"], "--tau nan: expected a finite number above 0"),
        (["--lr", "inf"], "--lr inf: expected a finite number above 0"),
        (["--epochs", "-1"], "--epochs -1: expected an integer of at least 1"),
        (["--data", "cifar10"], "--root: expected the directory that holds cifar10"),
        (["--data", "cifar10", "--root", "/no"], "--root /no: expected a directory"),
        (["--download"], "--download: expected one of fashion-mnist"),
        (["--fsdp"], "--fsdp: expected the processes of torchrun, found this one alone"),
        (["--accumulate", "65"], "--batch-size 64: expected at least 65"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_directory(tmp_path, capsys, words, message):
    assert run("train", *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ghl: error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_none(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("train", "--epochs", "ten")
    assert stopped.value.code == 2
    assert "argument --epochs: invalid int value: 'ten'" in capsys.readouterr().err


def test_resume_refuses_other_settings(tmp_path, capsys):
    assert run("train", *SMALL, "--out", tmp_path) == 0
    assert run("train", *SMALL, "--out", tmp_path) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert run("train", "--out", tmp_path, "--resume", "--epochs", "2", "--rule", "bp") == 2
    error = capsys.readouterr().err
    assert "--epochs 2 (the run has 1)" in error
    assert "--rule bp (the run has ghl)" in error


def test_resume_without_a_run_is_an_error(tmp_path, capsys):
    assert run("train", "--resume", "--out", tmp_path / "typo") == 2
    assert capsys.readouterr().err.startswith("ghl: error: --resume: expected a run in ")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("missing", ["numpy", "ghl_kernels.rule"])
def test_a_package_that_is_not_installed_is_one_line(capsys, monkeypatch, missing):
    """But for what is our own, which is a defect."""

    def absent(args):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr("ghl.recipes.train.train", absent)
    if missing == "numpy":
        assert run("train") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            "ghl: error: No module named 'numpy': pip install 'ghl-kernels[train]'"
        )
    else:
        with pytest.raises(ModuleNotFoundError):
            run("train")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune", "deephebb_b65x"], "deephebb_b65x"),
        (["tune", "--budget", "0"], "--budget is 0.0, must be above 0"),
        (["tune", "--modes", "float16"], "--modes is 'float16', must be one of"),
        (["tune", "--strategies", "cuda_sm91"], "--strategies is 'cuda_sm91', must be one of"),
        (["layers", "--seconds", "-3", "--device", "cpu"], "--seconds is -3.0, must be above 0"),
        (["layers", "--resume", "--device", "cpu"], "--resume: expected with --out FILE"),
    ],
)
def test_bad_input_of_benchmarks_is_one_line(capsys, words, message):
    """Told whether or not there is a GPU."""
    assert run("bench", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ghl: error: ") and message in line


@pytest.mark.skipif(os.name != "posix", reason="of file systems of Unix")
def test_a_directory_that_cannot_be_made_is_one_line(capsys):
    assert run("train", *SMALL, "--out", "/dev/null/x") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ghl: error: ") and "/dev/null/x" in line


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m ghl doctor | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == "installed\n"
    assert "Traceback" not in done.stderr


def test_what_the_rule_trains_is_told(tmp_path, capsys):
    assert run("train", *SMALL, "--out", tmp_path) == 0
    assert "ghl trains 3 of 4 layers with 9" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "eval"])
def test_damaged_checkpoint(tmp_path, capsys, command):
    assert run("train", *SMALL, "--out", tmp_path) == 0
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    words = ["train", "--resume", "--out", tmp_path] if command == "train" else ["eval", tmp_path]
    assert run(*words) == 2
    assert capsys.readouterr().err.startswith(f"ghl: error: checkpoint {path}: expected an intact")


def test_checkpoint_of_another_version(tmp_path, capsys):
    assert run("train", *SMALL, "--out", tmp_path) == 0
    path = tmp_path / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {"version": 99}, path)
    assert run("eval", tmp_path) == 2
    assert "expected version 3, found 99" in capsys.readouterr().err


def test_eval_without_a_run(tmp_path, capsys):
    assert run("eval", tmp_path / "none") == 2
    assert "none: expected a run in it" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "file"), [("eval", "config.json"), ("align", "alignment.csv")])
def test_a_directory_of_several_runs_is_told(command, file, tmp_path, capsys):
    for name in ("ghl", "bp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    assert run(command, tmp_path) == 2
    assert "the runs inside have one: bp, ghl" in capsys.readouterr().err


def test_unexpected_errors_keep_their_traceback(tmp_path, monkeypatch):
    def broken(run):
        raise RuntimeError("a bug")

    monkeypatch.setattr("ghl.recipes.train.train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("train", *SMALL, "--out", tmp_path / "out")
