"""Runs of two processes that lose one, a disk that fills up, a world that changes."""

import os
import subprocess
import sys

import pytest
import torch

SMALL = {
    "rule": "ghl",
    "width": 0.05,
    "epochs": 2,
    "batch_size": 32,
    "limit_train": 200,
    "limit_test": 51,
    "momentum": 0.9,
    "ema": 0.9,
    "accumulate": 2,
    "checkpoint_every": 2,
    "device": "cpu",
}

# The command line; in the first life of rank 1 the process kills itself after a step.
WORKER = """
import os, signal, sys
import torch
from ghl.cli import main

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    kill_after, step, calls = int(sys.argv[1]), torch.optim.SGD.step, 0

    def counted(*args, **kwargs):
        global calls
        calls += 1
        result = step(*args, **kwargs)
        if calls == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    torch.optim.SGD.step = counted
sys.exit(main(sys.argv[2:]))
"""


def arguments(settings):
    words = ["train"]
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        words += [option] if value is True else [option, str(value)]
    return words


def start(script, settings, out, *, kill_after=0, processes=2, restarts=0):
    """Two processes under torchrun; what they print."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", str(script)]
    command += [str(kill_after), *arguments(settings), "--out", str(out)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode == 0) == (restarts > 0 or not kill_after), done.stdout + done.stderr
    return done.stdout


def result(out):
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    rows = [row.rsplit(",", 3)[0] for row in (out / "metrics.csv").read_text().splitlines()]
    return state, rows


def assert_same(one, two):
    (state, rows), (other, other_rows) = result(one), result(two)
    assert rows == other_rows
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    for name, tensor in state["average"]["averages"].items():
        assert torch.equal(tensor, other["average"]["averages"][name]), name


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "worker.py"
    path.write_text(WORKER)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, script):
    """A run of two processes that nobody disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    start(script, SMALL, out)
    return out


def test_a_killed_rank_leaves_no_trace(script, undisturbed, tmp_path):
    """Killed in the second epoch, after a step that no checkpoint has."""
    output = start(script, SMALL, tmp_path, kill_after=11, restarts=1)
    assert "continuing after epoch 1 and 4 steps of 2" in output
    assert_same(tmp_path, undisturbed)
