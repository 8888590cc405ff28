"""Stages of a suite: processes beside each other, each with a time of its own, told as they end.

A stage may begin when another ends, or make itself ready early and be timed last, by a gate.
Imports nothing that could be broken.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
LEAVING = 15  # seconds in which a stage that minds its time starts and ends
PAUSE = 0.05  # seconds between looks at what runs
PATIENCE = 15  # seconds in which an interrupted stage ends: xdist kills workers that hang after 10
TAIL = 12  # lines of a failed stage that are worth the screen


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step: its command, the most seconds it gets, and those kept for it from earlier ones.

    `{seconds}` in the command is replaced by what it has, less what starting and ending take.
    checks: if it fails, all has failed. beside: stages in a row with the same run together, those
    `after` another from its end on. gate: a file that it waits for once it has made itself ready,
    and `ready`, by which it says so; the suite makes it when all others beside it are over or
    ready, of several stages one after the other.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    reserve: float = 0
    checks: bool = True
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: str | None = None
    beside: str | None = None
    after: str | None = None
    gate: Path | None = None

    @property
    def ready(self) -> Path | None:
        return self.gate.with_suffix(".ready") if self.gate else None


def heed_interrupts() -> None:
    """Which a shell's background jobs ignore, and what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """A stage's process, from its start on."""

    def __init__(self, stage: Stage, work: Path, seconds: float) -> None:
        self.stage, self.seconds, self.began = stage, seconds, time.monotonic()
        self.output = (work / f"output-{stage.name}").open("w+", errors="replace")
        self.process: subprocess.Popen[bytes] | None = None
        self.interrupted = False
        within = str(max(1, int(seconds) - LEAVING))
        words = [word.replace("{seconds}", within) for word in stage.command]
        try:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env={**os.environ, **stage.environment}, stdout=self.output,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                preexec_fn=heed_interrupts,
            )  # fmt: skip
        except OSError as error:
            self.output.write(str(error))

    def has_ended(self) -> bool:
        """Whether it has, or is given up. When its time is over, it is interrupted.

        Its leader alone: pytest then ends its workers and says what has failed, but may hang if
        they are interrupted too.
        """
        if self.process is None or self.process.poll() is not None:
            return True
        late = time.monotonic() - self.began - self.seconds
        if late >= 0 and not self.interrupted:
            self.interrupted = True
            self.process.send_signal(signal.SIGINT)
        return late >= PATIENCE

    def outcome(self) -> tuple[int | None, str]:
        """The exit status, None if the time was over, and the output, once it has ended."""
        while not self.has_ended():
            time.sleep(PAUSE)
        status: int | None = 127
        if self.process is not None:
            status = None if self.interrupted else self.process.poll()
            self.stop()
        with self.output as output:
            output.seek(0)
            return status, output.read()

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process)


@dataclasses.dataclass
class Suite:
    """Where the files go and until when there is time."""

    out: Path
    work: Path
    deadline: float
    log: TextIO
    scale: float = 1.0  # of what is reserved, where there is less time than usual
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def run(self, stages: Sequence[Stage]) -> None:
        done = 0
        for _, group in itertools.groupby(stages, lambda stage: stage.beside or stage.name):
            together = list(group)
            done += len(together)
            reserved = sum(later.reserve for later in stages[done:] if not later.skipped)
            left = self.deadline - time.monotonic() - self.scale * reserved
            self.run_together(together, left)

    def run_together(self, stages: Sequence[Stage], left: float) -> None:
        """Run stages beside each other, each within its time, and note how they went."""
        until = time.monotonic() + left
        for stage in stages:
            for file in (stage.gate, stage.ready):
                if file:  # an earlier run's
                    file.unlink(missing_ok=True)
        running = self.started(stages, None, until)
        try:
            while running:
                open_gate(running)
                over = next((one for one in running if one.has_ended()), None)
                if over is None:
                    time.sleep(PAUSE)
                    continue
                self.tell(over, *over.outcome())
                running.remove(over)
                running += self.started(stages, over.stage.name, until)
        finally:
            for one in running:
                one.stop()

    def started(self, stages: Sequence[Stage], ended: str | None, until: float) -> list[Running]:
        """Those of the stages that wait for the one that has ended, None in the beginning."""
        names = {stage.name for stage in stages}
        running = []
        for stage in stages:
            if (stage.after if stage.after in names else None) != ended:
                continue
            kept = sum(later.reserve for later in timed_after(stage, stages))
            seconds = min(stage.seconds, until - time.monotonic() - self.scale * kept)
            if stage.skipped or seconds < 1:
                reason = stage.skipped or "no time left"
                self.note(stage, None if stage.skipped else False, 0.0, f"skipped: {reason}")
                running += self.started(stages, stage.name, until)
            else:
                running.append(Running(stage, self.work, seconds))
        return running

    def tell(self, one: Running, status: int | None, output: str) -> None:
        self.log.write(f"--- {one.stage.name}\n{output}\n")
        self.log.flush()
        took = time.monotonic() - one.began
        how = {0: "ok", None: f"stopped after {one.seconds:.0f} s"}
        self.note(one.stage, status == 0, took, how.get(status, f"failed ({status})"))
        lines = output.strip().splitlines()
        for line in lines[-1:] if status == 0 else lines[-TAIL:]:
            print(f"    {line[:200]}", flush=True)

    def note(self, stage: Stage, ok: bool | None, seconds: float, how: str) -> None:
        self.results.append(
            {"name": stage.name, "ok": ok, "seconds": round(seconds, 1), "how": how,
             "checks": stage.checks}
        )  # fmt: skip
        print(f"{stage.name:<14} {seconds:6.1f} s  {how}", flush=True)


def timed_after(stage: Stage, stages: Sequence[Stage]) -> list[Stage]:
    """Those whose gates open when this one beside them is over."""
    gated = [one for one in stages if one.gate and not one.skipped]
    return gated[gated.index(stage) + 1 :] if stage in gated else gated


def open_gate(running: Sequence[Running]) -> None:
    """That of the first, if all that run wait for theirs."""
    waiting = [one.stage for one in running if one.stage.ready and one.stage.ready.exists()]
    if len(waiting) == len(running) and waiting[0].gate:
        waiting[0].gate.touch()


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """End a stage and what it started; a process that is done has perhaps left others."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            continue
