"""A training run in a directory: start or resume, one table row and one checkpoint per epoch.

What an epoch does is in `trainer.py`, what the files look like in `metrics.py` and
`checkpoint.py`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghl.recipes import checkpoint, metrics
from ghl.recipes.config import Config
from ghl.recipes.figures import draw_curves
from ghl.recipes.metrics import Row
from ghl.recipes.trainer import Diverged, Trainer

CONFIG, CHECKPOINT, METRICS = "config.json", "checkpoint.pt", "metrics.csv"


@dataclass(frozen=True)
class Run:
    """A directory and the settings of what is trained there."""

    out: Path
    config: Config


def open_run(out: Path, given: Mapping[str, Any], *, resume: bool) -> Run:
    """The run that `given` describes, or with `resume` the one that `out` already holds.

    Writes nothing. FileExistsError if `out` holds a run that is not to be resumed, ValueError if
    a setting is not valid or not that of the run.
    """
    held = [name for name in (CONFIG, CHECKPOINT, METRICS) if (out / name).exists()]
    if not held:
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"--out {out}: expected a directory, found a file")
        return Run(out, Config.resolve(given))
    if not resume:
        raise FileExistsError(
            f"--out {out}: expected a directory without a run, found {held[0]}"
            " (--resume continues it)"
        )
    return Run(out, Config.load(out / CONFIG).resumed(given))


def train(run: Run) -> list[Row]:
    """Train to the last epoch, from the run's checkpoint where it has one; all its rows.

    ValueError when the loss is not finite any more; the last good checkpoint stays.
    """
    config = run.config
    trainer = Trainer(config)
    rows = _start_or_continue(run, trainer)
    print(f"{config.rule}: {describe(config)}, in {run.out}")
    if rows:
        print(f"continuing after epoch {rows[-1].epoch} of {config.epochs}")
    print(metrics.header(), flush=True)
    board = metrics.TensorBoard(run.out / "tensorboard", len(rows))
    try:
        while len(rows) < config.epochs:
            rows.append(_epoch(trainer, len(rows) + 1))
            board.add(rows[-1])
            _record(run, trainer, rows)
            print(metrics.line(rows[-1]), flush=True)
    except Diverged as error:
        kept = f"{CHECKPOINT} keeps epoch {len(rows)}" if rows else "there is no checkpoint"
        raise Diverged(
            f"epoch {len(rows) + 1} of {run.out}: {error}; a smaller --lr or --lr-hebb may help"
            f" ({kept})"
        ) from error
    finally:
        board.close()
        if rows:
            draw_curves(run.out / "curves.png", {config.rule: rows}, describe(config))
    return rows


def describe(config: Config) -> str:
    """What is trained on what, for titles."""
    width = "" if config.width == 1 else f" of width {config.width:g}"
    return f"{config.arch}{width} on {config.data}"


def _start_or_continue(run: Run, trainer: Trainer) -> list[Row]:
    """Bring the trainer to the run's last checkpoint and its files with it; the rows so far."""
    path = run.out / CHECKPOINT
    rows: list[Row] = []
    if path.exists():
        state = checkpoint.load(path, arch=run.config.arch, rule=trainer.rule_fields())
        trainer.restore(state)
        rows = [Row(**row) for row in state["history"]]
    run.out.mkdir(parents=True, exist_ok=True)
    run.config.save(run.out / CONFIG)
    metrics.write_csv(run.out / METRICS, rows)
    return rows


def _epoch(trainer: Trainer, epoch: int) -> Row:
    begin, lr = time.perf_counter(), trainer.lr
    train_loss, train_acc = trainer.train_epoch(f"epoch {epoch}/{trainer.config.epochs}")
    test_loss, test_acc = trainer.evaluate()
    seconds = time.perf_counter() - begin
    return Row(epoch, lr, train_loss, train_acc, test_loss, test_acc, seconds)


def _record(run: Run, trainer: Trainer, rows: Sequence[Row]) -> None:
    """Write the rows, then the checkpoint that counts: a kill in between repeats the epoch."""
    metrics.write_csv(run.out / METRICS, rows)
    state = trainer.state() | {"epoch": len(rows), "history": [asdict(row) for row in rows]}
    checkpoint.save(run.out / CHECKPOINT, state)


def compare(runs: Sequence[Run], out: Path) -> None:
    """Train several runs one after the other, then print their table and draw their figure."""
    rows = {}
    for run in runs:
        rows[run.config.rule] = train(run)
        print()
    print(metrics.comparison(rows), flush=True)
    draw_curves(out / "comparison.png", rows, describe(runs[0].config))


def evaluate(out: Path, given: Mapping[str, Any]) -> tuple[int, float, float]:
    """Epoch, test loss and test accuracy in percent of a run's checkpoint.

    `given` may say where data and device are now.
    """
    config = Config.load(out / CONFIG).moved(given)
    trainer = Trainer(config)
    state = checkpoint.load(out / CHECKPOINT, arch=config.arch, rule=trainer.rule_fields())
    trainer.restore_model(state)
    return state["epoch"], *trainer.evaluate()
