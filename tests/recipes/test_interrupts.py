"""Ctrl-C ends a run, also where Python swallows it."""

import contextlib
import os
import signal
import time

import pytest

from ghl.cli import main
from ghl.recipes import interrupts, trainer

pytestmark = pytest.mark.usefixtures("interruptible")
SMALL = ["train", "--width", "0.05", "--epochs", "3", "--limit-train", "128", "--limit-test", "64"]


def swallowed():
    """As in a finalizer."""
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_an_interrupt_that_was_swallowed_ends_the_run(tmp_path, monkeypatch, capsys):
    begin = trainer.Trainer._begin

    def begin_interrupted(self, *arguments):
        if self.epoch == 1:
            swallowed()
        return begin(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_begin", begin_interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main([*SMALL, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("ghl: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert main([*SMALL, "--out", str(tmp_path), "--resume"]) == 0


def test_what_fails_because_of_an_interrupt_is_one():
    """A loader's worker that the terminal interrupted too."""
    with pytest.raises(KeyboardInterrupt), interrupts.heard():
        swallowed()
        raise RuntimeError("DataLoader worker exited unexpectedly")
    with pytest.raises(RuntimeError, match="a bug"), interrupts.heard():
        raise RuntimeError("a bug")


def test_what_was_asked_of_one_run_does_not_end_the_next():
    with pytest.raises(KeyboardInterrupt), interrupts.heard():
        swallowed()
    interrupts.check()


def test_what_is_ignored_stays_so():
    """As of a command in a shell's background, which Ctrl-C is not meant for."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.heard(signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) is interrupts.ask
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
