"""Resuming after SIGKILL: processes are really killed, and final weights compared bit for bit."""

import os
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ghl.recipes.config import Config
from ghl.recipes.train import Run, open_run, train

SMALL = {"width": 0.05, "epochs": 3, "limit_train": 128, "limit_test": 64, "device": "cpu"}

# For every point FUNCTION-N given, a forked process runs the command line in BASE/FUNCTION-N and
# kills itself at the N-th call: before os.replace puts a file in place (1: config.json,
# 2: metrics.csv, then both files of every epoch), or after an optimizer's step.
KILLER = """
import os, signal, sys
import sklearn.datasets, sklearn.model_selection, torch, torch._dynamo  # once, not in every fork
from ghl.cli import main
from ghl.recipes import train

def kill_at(owner, name, count, after):
    original, calls = getattr(owner, name), 0
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs) if calls < count or after else None
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, counted)

base, points, arguments = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
for point in points:
    child = os.fork()
    if child == 0:
        name, count = point.split("-")
        owner = {"replace": os, "step": torch.optim.SGD}[name]
        kill_at(owner, name, int(count), after=name == "step")
        os._exit(main([*arguments, "--out", os.path.join(base, point)]))
    status = os.waitpid(child, 0)[1]
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        sys.exit(f"{point}: not killed, status {status}")
"""
# Where to kill, and the epoch of the checkpoint that is then found (None: no checkpoint).
POINTS = {
    "replace-1": None,
    "replace-2": None,
    "step-2": None,
    "replace-4": None,
    "replace-5": 1,
    "replace-6": 1,
    "step-5": 2,
}


def arguments(settings):
    words = ["train"]
    for name, value in settings.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def start(*command):
    threads = str(torch.get_num_threads())
    path = os.pathsep.join(entry for entry in sys.path if entry)
    # Other thread counts sum in another order, and the weights would differ in their last bits.
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": threads}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def result(directory):
    """Final weights, and metrics.csv without its last three columns, the times."""
    model = torch.load(directory / "checkpoint.pt", weights_only=True)["model"]
    rows = (directory / "metrics.csv").read_text().splitlines()
    return model, [row.rsplit(",", 3)[0] for row in rows]


def assert_same_result(one, two):
    (weights, rows), (other_weights, other_rows) = result(one), result(two)
    assert rows == other_rows
    assert weights.keys() == other_weights.keys()
    for name in weights:
        assert torch.equal(weights[name], other_weights[name]), name


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A directory for each of POINTS, left by a process that was killed there."""
    base = tmp_path_factory.mktemp("killed")
    process = start("-c", KILLER, str(base), ",".join(POINTS), *arguments(SMALL))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    return base


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The directory of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted")
    train(Run(out, Config.resolve(SMALL)))
    return out


@pytest.mark.parametrize("point", POINTS)
def test_resume_gives_the_uninterrupted_result(killed, uninterrupted, point):
    out = killed / point
    path = out / "checkpoint.pt"
    found = torch.load(path, weights_only=True)["epoch"] if path.exists() else None
    assert found == POINTS[point]
    torch.rand(3)
    train(open_run(out, SMALL, resume=True))
    assert_same_result(out, uninterrupted)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_kill_and_resume_on_the_command_line(tmp_path):
    """Killed by the clock, not at a chosen line; resumed with nothing but the directory."""
    settings = SMALL | {"epochs": 15}
    out = tmp_path / "killed"
    process = start("-m", "ghl", *arguments(settings), "--out", str(out))
    deadline = time.monotonic() + 60
    while not (
        (out / "metrics.csv").exists() and (out / "metrics.csv").read_text().count("\n") > 4
    ):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] < settings["epochs"]

    resumed = start("-m", "ghl", "train", "--out", str(out), "--resume")
    train(Run(tmp_path / "whole", Config.resolve(settings)))
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors.decode()
    assert_same_result(out, tmp_path / "whole")
