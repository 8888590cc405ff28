"""Cells of `ghl reproduce`: computed once, and what is left of them by interrupts and kills."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ghl.recipes.reproduce import cells
from tests.recipes.slow_cells import make

pytestmark = pytest.mark.usefixtures("interruptible")


@pytest.mark.parametrize("processes", [1, 2])
def test_cells_are_computed_once(tmp_path, processes):
    first = cells.run(make(3), tmp_path, processes, "test")
    assert {name: stored["result"]["value"] for name, stored in first.items()} == {
        "c0": 0, "c1": 1, "c2": 2,
    }  # fmt: skip
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    assert cells.run(make(3), tmp_path, 1, "test") == first
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()} == stamps


def test_a_cell_of_other_settings_is_computed_anew(tmp_path):
    cells.run(make(1), tmp_path, 1, "test")
    other = cells.Cell("c0", "tests.recipes.slow_cells:slow", {"seconds": 0.0, "value": 9})
    assert cells.run([other], tmp_path, 1, "test")["c0"]["result"] == {"value": 9}


def test_a_kill_loses_only_the_cells_in_progress(tmp_path):
    code = (
        "from pathlib import Path; from ghl.recipes.reproduce import cells;"
        "from tests.recipes.slow_cells import make;"
        f"cells.run(make(2) + make(4, 60.0)[2:], Path({str(tmp_path)!r}), 1, 'test')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("cells/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()  # nothing can be tidied up any more
    process.wait(timeout=30)
    done = sorted(p.name for p in tmp_path.glob("cells/*"))
    assert done == ["c0.json", "c1.json"]
    assert json.loads((tmp_path / "cells" / "c1.json").read_text())["result"] == {"value": 1}
    assert len(cells.run(make(3), tmp_path, 1, "test")) == 3


@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupt_that_was_swallowed_ends_the_run(tmp_path, monkeypatch, processes, more):
    """Python discards one in a finalizer. The cells in progress are kept, others not begun; also
    that of the last cells is told."""

    class Bar(cells.tqdm):
        def update(self, cost):
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            super().update(cost)

    monkeypatch.setattr(cells, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        cells.run(make(processes + more), tmp_path, processes, "test")
    assert len(list(tmp_path.glob("cells/*"))) == processes


def start(out):
    """Two processes that compute cells of three seconds."""
    code = (
        "from pathlib import Path; from ghl.recipes.reproduce import cells;"
        "from tests.recipes.slow_cells import make;"
        f"cells.run(make(6, 3.0), Path({str(out)!r}), 2, 'test')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def stop(out, process, *signals):
    """How many they have finished after the last of these signals, which come in the middle of the
    second two cells or, on a busy machine, later; and what they have said."""
    deadline = time.monotonic() + 120
    while len(list(out.glob("cells/*.json"))) < 2:
        assert time.monotonic() < deadline, "no two cells in two minutes"
        time.sleep(0.05)
    time.sleep(0.5)
    for send in signals:
        before = len(list(out.glob("cells/*.json")))
        send(process)
        time.sleep(0.5)
    errors = process.communicate(timeout=60)[1]  # until the last of its processes has ended
    assert process.returncode, errors
    return len(list(out.glob("cells/*.json"))) - before, errors


def test_cells_in_progress_are_finished_after_an_interrupt(tmp_path):
    """After Ctrl-C, which all processes get, and after the death of the main one; but a second
    interrupt is obeyed at once, and SIGTERM is one: if all get it, no error of the pool's."""

    def interrupt(process):
        os.killpg(process.pid, signal.SIGINT)

    ways = {
        "interrupted": [interrupt],
        "killed": [subprocess.Popen.kill],
        "twice": [subprocess.Popen.terminate, interrupt],
        "terminated": [lambda process: os.killpg(process.pid, signal.SIGTERM)],
    }
    started = {name: start(tmp_path / name) for name in ways}
    with ThreadPoolExecutor() as pool:
        ended = {
            name: pool.submit(stop, tmp_path / name, started[name], *signals)
            for name, signals in ways.items()
        }
    found = {name: future.result() for name, future in ended.items()}
    counts = {name: count for name, (count, _) in found.items()}
    assert counts == {"interrupted": 2, "killed": 2, "twice": 0, "terminated": 0}
    assert found["terminated"][1].strip().endswith("KeyboardInterrupt")
    for name in ("interrupted", "twice"):
        assert "once more to drop them" in found[name][1]
