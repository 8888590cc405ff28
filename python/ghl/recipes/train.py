"""A training run in a directory: start or resume, one table row and one checkpoint per epoch.

What an epoch does is in `trainer.py`, what the files look like in `metrics.py` and
`checkpoint.py`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ghl.recipes import checkpoint, metrics, sharded
from ghl.recipes.checkpoint import NotWritten
from ghl.recipes.config import Config
from ghl.recipes.disk import FULL, WhileRoom
from ghl.recipes.distributed import World
from ghl.recipes.figures import draw_curves
from ghl.recipes.metrics import Row
from ghl.recipes.recording import recorded
from ghl.recipes.trainer import Diverged, Trainer

CONFIG, CHECKPOINT, METRICS = "config.json", "checkpoint.pt", "metrics.csv"


@dataclass(frozen=True)
class Run:
    """A directory and the settings of what is trained there."""

    out: Path
    config: Config


def held_files(out: Path) -> list[str]:
    return [name for name in (CONFIG, CHECKPOINT, METRICS) if (out / name).exists()]


def holds_a_run(out: Path) -> bool:
    """Whether there is a run in a directory."""
    return bool(held_files(out))


def open_run(out: Path, given: Mapping[str, Any], *, resume: bool) -> Run:
    """The run that `given` describes, or with `resume` the one that `out` already holds.

    Writes nothing. FileExistsError if `out` holds a run that is not to be resumed, ValueError if
    a setting is not valid or not that of the run.
    """
    held = held_files(out)
    if not held:
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"--out {out}: expected a directory, found a file")
        return Run(out, Config.resolve(given))
    if not resume:
        raise FileExistsError(
            f"--out {out}: expected a directory without a run, found {held[0]} (--resume"
            " continues it; other settings want another directory, or this one deleted)"
        )
    return Run(out, Config.load(out / CONFIG).resumed(given))


def train(run: Run, beside: Sequence[Run] = ()) -> list[Row]:
    """Train to the last epoch, from the run's checkpoint where it has one; all its rows.

    The settings of the runs `beside` it are kept as its own are, for when they are resumed.
    Called by every process of a run; the first prints and writes. ValueError when the loss or a
    weight is not finite any more; the last good checkpoint stays. NotWritten if the disk is full in
    the end.
    """
    config = run.config
    if config.fsdp and not torch.distributed.is_initialized():
        raise ValueError("--fsdp: expected the processes of torchrun, found this one alone")
    trainer = Trainer(config)
    rows = _start_or_continue(run, trainer, beside)
    with recorded(trainer, run.out):
        _to_the_end(run, trainer, rows)
    return rows


def _to_the_end(run: Run, trainer: Trainer, rows: list[Row]) -> None:
    """What is left of the run, and on the main process what is told of it."""
    config = run.config
    if not trainer.world.main:
        _epochs(run, trainer, rows, lambda row: None)
        return
    print(f"{config.rule}: {describe(config)}, in {run.out}")
    if config.rule != "bp":
        print(f"{config.rule} trains {trainer.share_of_rule()}, backpropagation the others")
    if rows or trainer.step:
        print(f"continuing after {_place(len(rows), trainer.step)} of {config.epochs}")
    print(metrics.header(), flush=True)
    board = WhileRoom(metrics.TensorBoard(run.out / "tensorboard", len(rows)), "TensorBoard")

    def show(row: Row) -> None:
        board.add(row)
        print(metrics.line(row), flush=True)

    try:
        _epochs(run, trainer, rows, show)
    except Diverged as error:
        raise Diverged(
            f"epoch {len(rows) + 1} of {run.out}: {error}; a smaller --lr or --lr-hebb may help"
            f" ({_kept(run, trainer)})"
        ) from error
    finally:
        board.close()
        if rows:
            draw_curves(run.out / "curves.png", {config.rule: rows}, describe(config))


def _place(epoch: int, step: int) -> str:
    """How far a run is, in words."""
    return f"epoch {epoch}" + (f" and {step} steps" if step else "")


def _kept(run: Run, trainer: Trainer) -> str:
    """What is left of a run that diverged, in words."""
    path = run.out / CHECKPOINT
    if not path.exists():
        return "there is no checkpoint"
    state = checkpoint.load(path, arch=run.config.arch, rule=trainer.rule_fields())
    return f"{CHECKPOINT} keeps {_place(state['epoch'], state['step'])}"


def _epochs(run: Run, trainer: Trainer, rows: list[Row], show: Callable[[Row], None]) -> None:
    """What is left of the run, epoch by epoch; NotWritten if its end could not be saved."""
    every = run.config.checkpoint_every
    full = None

    def after_step() -> None:
        if every and trainer.schedule.last_epoch % every == 0:
            trainer.means()  # Diverged, before the last good checkpoint is replaced
            _record(run, trainer, rows)

    while len(rows) < run.config.epochs:
        rows.append(_epoch(trainer, len(rows) + 1, after_step))
        show(rows[-1])
        full = _record(run, trainer, rows)
    if full is not None:
        raise NotWritten(
            f"{run.out}: expected room for a checkpoint at the end of the run, the disk is full"
            f" ({full}); --resume continues from the last one that was written"
        )


def describe(config: Config) -> str:
    """What is trained on what, for titles."""
    width = "" if config.width == 1 else f" of width {config.width:g}"
    return f"{config.arch}{width} on {config.data}"


def _start_or_continue(run: Run, trainer: Trainer, beside: Sequence[Run]) -> list[Row]:
    """Bring the trainer to the run's last checkpoint and its files with it; the rows so far."""
    path = run.out / CHECKPOINT
    rows: list[Row] = []
    if path.exists():
        state = checkpoint.load(path, arch=run.config.arch, rule=trainer.rule_fields())
        _check_world(run.config, len(state["ranks"]), trainer.world)
        trainer.restore(state, _sharded_tensors(run.out, state, trainer))
        rows = [Row(**row) for row in state["history"]]
    trainer.world.gather(None)  # nobody writes before all have read
    if trainer.world.main:
        for each in (*beside, run):
            each.out.mkdir(parents=True, exist_ok=True)
            each.config.save(each.out / CONFIG)
        metrics.write_csv(run.out / METRICS, rows)
    return rows


def _check_world(config: Config, before: int, world: World) -> None:
    """Refuse, or announce, that a run goes on with another number of processes."""
    if before == world.size:
        return
    change = f"the run had {before} processes and has {world.size} now"
    if config.world_change == "refuse":
        raise ValueError(f"--world-change refuse: {change}; rescale goes on with them")
    if world.main:
        print(
            f"rescaled: {change}, which share its --batch-size of {config.batch_size}", flush=True
        )


def _sharded_tensors(out: Path, state: dict[str, Any], trainer: Trainer) -> dict[str, Any] | None:
    """The tensors that a sharded run's checkpoint names, as this trainer is sharded; or None."""
    if state["sharded"] is None:
        return None
    tensors = trainer.tensors()
    sharded.load(out / state["sharded"], tensors)
    return tensors


def _epoch(trainer: Trainer, epoch: int, after_step: Callable[[], None]) -> Row:
    lr = trainer.lr
    label = f"epoch {epoch}/{trainer.config.epochs}"
    train_loss, train_acc = trainer.train_epoch(label, after_step)
    begin = time.perf_counter()
    test_loss, test_acc = trainer.evaluate()
    pace = trainer.pace
    seconds = pace.seconds + time.perf_counter() - begin
    losses = train_loss, train_acc, test_loss, test_acc
    return Row(epoch, lr, *losses, seconds, pace.images_per_second, pace.waiting)


def _record(run: Run, trainer: Trainer, rows: Sequence[Row]) -> OSError | None:
    """Write the rows, then the checkpoint that counts: a kill in between repeats what followed.

    On a full disk the last checkpoint stays, the run goes on, and the error is returned.
    """
    state = trainer.state() | {"sharded": None, "history": [asdict(row) for row in rows]}
    main = trainer.world.main
    try:
        if trainer.sharded:
            state["sharded"] = sharded.name(trainer.epoch, trainer.step)
            sharded.save(run.out / state["sharded"], trainer.tensors())
        if main:
            metrics.write_csv(run.out / METRICS, rows)
            checkpoint.save(run.out / CHECKPOINT, state)
            sharded.keep_only(run.out, state["sharded"])
    except OSError as error:
        if error.errno not in FULL:
            raise
        if main:
            if state["sharded"]:
                sharded.remove(run.out / state["sharded"])
            print(
                f"the disk is full ({error}): epoch {trainer.epoch}, step {trainer.step} is not"
                f" saved, and {CHECKPOINT} is that of before",
                flush=True,
            )
        return error
    return None


def compare(runs: Sequence[Run], out: Path) -> None:
    """Train several runs one after the other, then print their table and draw their figure."""
    rows = {}
    for run in runs:
        rows[run.config.rule] = train(run, beside=runs)
        if World.current().main:
            print()
    if not World.current().main:
        return
    print(metrics.comparison(rows), flush=True)
    draw_curves(out / "comparison.png", rows, describe(runs[0].config))


def evaluate(out: Path, given: Mapping[str, Any]) -> tuple[int, float, float]:
    """Epoch, test loss and test accuracy in percent of a run's checkpoint.

    `given` may say where data and device are now.
    """
    config = Config.load(out / CONFIG).moved(given)
    trainer = Trainer(config)
    state = checkpoint.load(out / CHECKPOINT, arch=config.arch, rule=trainer.rule_fields())
    trainer.restore_model(state, _sharded_tensors(out, state, trainer))
    return state["epoch"], *trainer.evaluate()
