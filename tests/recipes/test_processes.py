"""Runs of two processes: the same as one, with one lost, rescaled, sharded; and full disks."""

import copy
import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.checkpoint import FileSystemWriter

from ghl.alignment.sinks import read_csv
from ghl.recipes import checkpoint, metrics, sharded
from ghl.recipes.config import Config
from ghl.recipes.train import Run, evaluate, open_run, train
from ghl.recipes.trainer import Trainer

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
# Seven steps an epoch: this one is in the second, after the checkpoint of its third.
KILL_AFTER = 11
# Steps of 29 images, of which one process has 14 and the other 15.
UNEVEN = {"arch": "resnet20", "width": 0.5, "epochs": 1, "batch_size": 29, "limit_train": 87}
UNEVEN |= {"checkpoint_every": 9, "align_every": 1}
UNDISTURBED = {"whole": {}, "uneven": UNEVEN | {"accumulate": 1}, "sharded": {"fsdp": True}}

# Command lines, each in two processes that are forked with all modules imported, in place of
# torchrun. RUNS is JSON: arguments of the command line, one list for each run.
FORKED = """
import json, os, socket, sys
import sklearn.datasets, sklearn.model_selection, torch, torch._dynamo
from ghl.cli import main
from ghl.recipes import train

for arguments in json.loads(sys.argv[1]):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in (0, 1):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            os._exit(main(arguments))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if codes != [0, 0]:
        sys.exit(f"{arguments}: {codes}")
"""

# The command line under torchrun. In its first life rank 1 kills itself after a step; in the second
# life rank 0 keeps a copy of what the first has left. Where Linux lists them, no thread of gloo's
# may be left when Python ends: one that holds a tensor then takes the process with it.
WORKER = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from ghl.cli import main

kill_after, life = int(sys.argv[1]), os.environ["TORCHELASTIC_RESTART_COUNT"]
if (os.environ["RANK"], life) == ("0", "1"):
    shutil.copytree(sys.argv[-1], sys.argv[-1] + "-left")
if (os.environ["RANK"], life) == ("1", "0"):
    step, calls = torch.optim.SGD.step, 0

    def counted(*args, **kwargs):
        global calls
        calls += 1
        result = step(*args, **kwargs)
        if calls == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    torch.optim.SGD.step = counted

def gloo():
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]

before = torch.distributed.destroy_process_group

def destroy():
    assert gloo() or sys.platform != "linux", "the threads have other names now"
    before()

torch.distributed.destroy_process_group = destroy
code = main(sys.argv[2:])
assert not gloo(), gloo()
sys.exit(code)
"""


def arguments(settings):
    words = ["train"]
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        words += [option] if value is True else [option, str(value)]
    return words


def printed_by(*command):
    """What Python prints with these arguments, once it has ended well."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The directory with the runs of UNDISTURBED, of two processes each."""
    base = tmp_path_factory.mktemp("undisturbed")
    runs = [
        [*arguments(SMALL | settings), "--out", str(base / name)]
        for name, settings in UNDISTURBED.items()
    ]
    printed_by("-c", FORKED, json.dumps(runs))
    return base


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Trains in two processes under torchrun, of which one is killed in the second epoch; gives
    the directory and what was printed. What they left then is in the directory NAME-left."""
    base = tmp_path_factory.mktemp("elastic")
    (base / "worker.py").write_text(WORKER)

    def run(name, **settings):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["--max-restarts=1", str(base / "worker.py"), str(KILL_AFTER)]
        out = base / name
        return out, printed_by(*command, *arguments(SMALL | settings), "--out", str(out))

    return run


@pytest.fixture(scope="module")
def killed(start):
    """Its alignment is recorded, which must change nothing."""
    return start("killed", align_every=2)


def rows(out):
    return [row.rsplit(",", 3)[0] for row in (out / "metrics.csv").read_text().splitlines()]


def state(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_a_killed_rank_leaves_no_trace(killed, undisturbed):
    out, printed = killed
    assert "continuing after epoch 1 and 3 steps of 2" in printed
    assert printed.count("epoch        lr") == 2  # by one process in each life
    whole = undisturbed / "whole"
    assert rows(out) == rows(whole)
    assert_same(state(out)["model"], state(whole)["model"])
    assert_same(state(out)["average"]["averages"], state(whole)["average"]["averages"])


def test_a_killed_run_has_recorded_every_measured_step_once(killed):
    found = [(int(row["step"]), row["layer"]) for row in read_csv(killed[0] / "alignment.csv")]
    layers = ("conv1", "conv2", "conv3", "classifier")
    assert found == [(step, layer) for step in range(0, 14, 2) for layer in layers]


def test_two_processes_are_one_with_two_micro_batches(undisturbed, tmp_path):
    """Also of an odd number of images: every image counts the same. What the rule adds to the
    weights is aligned alike."""
    out, config = undisturbed / "uneven", Config.resolve(SMALL | UNEVEN | {"accumulate": 2})
    train(Run(tmp_path, config))
    begin = Trainer(config).model.state_dict()
    two, one = state(out)["model"], state(tmp_path)["model"]
    for name in (name for name in one if name.endswith(("weight", "bias"))):
        apart = (two[name] - one[name]).abs().max() / (one[name] - begin[name]).abs().max()
        assert apart < 1e-3, name
    rows, same = (read_csv(at / "alignment.csv")[:22] for at in (out, tmp_path))
    for row, other in zip(rows, same, strict=True):
        for part in ("batch_cosine", "update_cosine", "weight_norm"):
            assert float(row[part]) == pytest.approx(float(other[part]), abs=1e-4), row["layer"]


def test_evaluation_counts_every_image_once(undisturbed):
    """51 images in two processes give what one process gives: no average of averages."""
    last = rows(undisturbed / "whole")[-1].split(",")
    epoch, loss, accuracy = evaluate(undisturbed / "whole", {})
    assert (epoch, accuracy) == (2, float(last[5]))
    assert loss == pytest.approx(float(last[4]), rel=1e-6)
    assert accuracy * 51 / 100 == pytest.approx(round(accuracy * 51 / 100))


def test_a_shrunken_world_is_refused_or_rescaled(killed, tmp_path, capsys):
    shutil.copytree(str(killed[0]) + "-left", tmp_path / "run")
    assert (state(tmp_path / "run")["epoch"], state(tmp_path / "run")["step"]) == (1, 3)
    with pytest.raises(ValueError, match="--world-change refuse: the run had 2 processes and has"):
        train(open_run(tmp_path / "run", {}, resume=True))
    found = train(open_run(tmp_path / "run", {"world_change": "rescale"}, resume=True))
    printed = capsys.readouterr().out
    assert (
        "rescaled: the run had 2 processes and has 1 now, which share its --batch-size of 32"
        in (printed)
    )
    # The epoch's images are those of both worlds together: none left out, none twice.
    assert round(found[1].train_acc * 200 / 100, 6) % 1 == 0
    assert state(tmp_path / "run")["ranks"][0]["totals"]["count"] == 200


def test_shards_are_the_same_run(start, undisturbed):
    """FSDP: other processes hold other parts, a kill changes nothing, one process can read it."""
    out = undisturbed / "sharded"
    again, printed = start("sharded-killed", fsdp=True)
    assert "continuing after epoch 1 and 3 steps of 2" in printed
    assert rows(out) == rows(again)
    assert [path.name for path in out.glob("shards-*")] == ["shards-2-0"]
    last = rows(out)[-1].split(",")
    assert evaluate(out, {})[1:] == pytest.approx((float(last[4]), float(last[5])), rel=1e-6)
    whole = rows(undisturbed / "whole")[-1].split(",")
    for field, other in zip(rows(out)[-1].split(","), whole, strict=True):
        assert float(field) == pytest.approx(float(other), rel=1e-3)


class FullDisk:
    """A file's device on which there is no room, from the n-th checkpoint on."""

    def __init__(self, monkeypatch, first):
        self.first, self.count, self.save = first, 0, torch.save
        monkeypatch.setattr(checkpoint.torch, "save", self)

    def __call__(self, state, file):
        self.count += 1
        if self.count < self.first:
            return self.save(state, file)
        file.write(bytes(1000))
        with open("/dev/full", "wb") as full:
            return self.save(state, full)


@pytest.fixture
def whole(tmp_path):
    """Settings of a run of one process, and what it gives with room on the disk."""
    settings = SMALL | {"accumulate": 1, "ema": 0.0}
    train(Run(tmp_path / "whole", Config.resolve(settings)))
    return settings, tmp_path / "whole"


@pytest.mark.parametrize("room_again", [True, False])
def test_a_full_disk_keeps_the_last_checkpoint(whole, tmp_path, monkeypatch, capsys, room_again):
    settings, expected = whole
    out = tmp_path / "run"
    disk = FullDisk(monkeypatch, first=3)
    if room_again:
        real = disk.save

        def save(state, file):
            return real(state, file) if state["epoch"] == 2 else disk(state, file)

        monkeypatch.setattr(checkpoint.torch, "save", save)
        train(Run(out, Config.resolve(settings)))
    else:
        with pytest.raises(checkpoint.NotWritten, match=f"{out}: expected room for a checkpoint"):
            train(Run(out, Config.resolve(settings)))
        assert (state(out)["epoch"], state(out)["step"]) == (0, 4)
    printed = capsys.readouterr().out
    assert os.strerror(errno.ENOSPC) in printed
    assert "epoch 0, step 6 is not saved, and checkpoint.pt is that of before" in printed
    assert not list(out.glob("*.partial"))
    monkeypatch.undo()
    train(open_run(out, {}, resume=True))
    assert_same(state(out)["model"], state(expected)["model"])
    assert rows(out) == rows(expected)


def test_a_full_disk_costs_events_and_curves_alone(tmp_path, monkeypatch, capsys):
    def full(writer):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics.SummaryWriter, "flush", full)
    monkeypatch.setattr(metrics.SummaryWriter, "close", full)
    (tmp_path / "curves.png.partial").symlink_to("/dev/full")
    train(Run(tmp_path, Config.resolve(SMALL | {"accumulate": 1})))
    printed = capsys.readouterr().out
    assert printed.count("TensorBoard is not recorded any more") == 1
    assert "curves.png is not drawn" in printed
    assert state(tmp_path)["epoch"] == 2


def test_a_full_disk_keeps_the_last_shards(tmp_path, monkeypatch, capsys):
    settings = Config.resolve(SMALL | {"fsdp": True, "epochs": 1})
    write, count = FileSystemWriter.write_data, 0

    def write_data(*args):
        nonlocal count
        count += 1
        if count > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_data)
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(checkpoint.NotWritten, match="the disk is full"):
            train(Run(tmp_path, settings))
    finally:
        destroy_process_group()
    assert "epoch 0, step 4 is not saved" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("shards-*")] == [state(tmp_path)["sharded"]]
    assert state(tmp_path)["sharded"] == "shards-0-2"
    evaluate(tmp_path, {})


@pytest.mark.parametrize("fsdp", [True, False])
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": "adamw", "momentum": 0.0}])
def test_an_optimizer_goes_on_where_it_was(tmp_path, options, fsdp):
    """In a world of one, from shards and from a whole checkpoint; and not if it is forgotten.

    With images in channels_last; weights too, but for fully_shard, which takes contiguous ones.
    """
    same = {"fsdp": fsdp, "channels_last": True, "limit_train": 96}
    config = Config.resolve(SMALL | same | options)
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        first = Trainer(config)
        first.train_epoch()
        state = copy.deepcopy(first.state())
        sharded.save(tmp_path / "shards", first.tensors())
        first.train_epoch()
        found = []
        for forget in (False, True):
            again = Trainer(config)
            tensors = again.tensors() if fsdp else None
            if tensors:
                sharded.load(tmp_path / "shards", tensors)
            if forget:
                (tensors or state)["optimizer"] = {} if fsdp else again.optimizer.state_dict()
            again.restore(state, tensors)
            again.train_epoch()
            found.append(again.model.state_dict()["conv1.weight"])
        same, other = (torch.equal(w, first.model.state_dict()["conv1.weight"]) for w in found)
        assert same and not other
    finally:
        destroy_process_group()


def test_other_errors_of_the_disk_stop_the_run(tmp_path, monkeypatch):
    def save(state, file):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(checkpoint.torch, "save", save)
    with pytest.raises(OSError, match="broken"):
        train(Run(tmp_path, Config.resolve(SMALL | {"accumulate": 1})))
