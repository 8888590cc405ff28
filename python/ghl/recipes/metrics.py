"""One row of numbers per epoch, and where it goes: the table, metrics.csv, TensorBoard.

How the numbers come about is the trainer's; pictures of them are in `figures.py`.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from ghl_kernels.files import write_text


@dataclass(frozen=True)
class Row:
    """One epoch: mean loss per example, accuracy in percent.

    `lr` is the learning rate of everything but the swapped layers at the epoch's first step.
    Throughput is that of training, over all processes; `waiting` is the percentage of its time in
    which the first process had no data.
    """

    epoch: int
    lr: float
    train_loss: float
    train_acc: float
    test_loss: float
    test_acc: float
    seconds: float
    images_per_second: float
    waiting: float


TIMES = ("seconds", "images_per_second", "waiting")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Replace metrics.csv by these rows, atomically; floats in full except the times."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    for row in rows:
        times = [f"{getattr(row, name):.3f}" for name in TIMES]
        writer.writerow([*astuple(row)[: -len(TIMES)], *times])
    write_text(path, text.getvalue())


def header() -> str:
    """The head of the table that `line` continues."""
    return (
        f"{'epoch':>5} {'lr':>9} {'train loss':>10} {'train acc':>9}"
        f" {'test loss':>9} {'test acc':>8} {'seconds':>8} {'images/s':>8} {'waiting':>7}"
    )


def line(row: Row) -> str:
    """One row of the table."""
    return (
        f"{row.epoch:>5} {row.lr:>9.2e} {row.train_loss:>10.4f} {row.train_acc:>9.2f}"
        f" {row.test_loss:>9.4f} {row.test_acc:>8.2f} {row.seconds:>8.1f}"
        f" {row.images_per_second:>8.0f} {row.waiting:>5.1f} %"
    )


def comparison(runs: Mapping[str, Sequence[Row]]) -> str:
    """A table with one line per run: its last row, its best test accuracy, its seconds."""
    lines = [
        f"{'rule':<6} {'epochs':>6} {'train acc':>9} {'test acc':>8} {'best':>7} {'seconds':>8}"
    ]
    for name, rows in runs.items():
        best = max(row.test_acc for row in rows)
        seconds = sum(row.seconds for row in rows)
        lines.append(
            f"{name:<6} {rows[-1].epoch:>6} {rows[-1].train_acc:>9.2f} {rows[-1].test_acc:>8.2f}"
            f" {best:>7.2f} {seconds:>8.1f}"
        )
    return "\n".join(lines)


class TensorBoard:
    """TensorBoard events of a run, starting after `epoch`; what lies beyond it is purged."""

    def __init__(self, directory: Path, epoch: int) -> None:
        self.writer = SummaryWriter(str(directory), purge_step=epoch + 1)

    def add(self, row: Row) -> None:
        """Write one row as scalars at its epoch."""
        for name, value in asdict(row).items():
            if name != "epoch":
                self.writer.add_scalar(name.replace("_", "/", 1), value, row.epoch)
        self.writer.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self.writer.close()
