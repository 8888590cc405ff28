"""Where the reports of a Monitor go: CSV, Parquet, TensorBoard, a table in the terminal.

Every sink has `add(report, step=None)` and `close()`; figures are drawn by `ghl align` from CSV.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from ghl.alignment.statistics import NUMBERS, PARTS
from ghl_kernels.files import write_atomic, write_text

Report = Mapping[str, Mapping[str, Any]]

COLUMNS = (
    "step",
    "layer",
    *(f"{part}_{value}" for part in PARTS for value in ("cosine", "inner")),
    *NUMBERS,
    "gaps",
)
NEURON_COLUMNS = ("step", "layer", "part", "neuron", "cosine")
LAYERS_CSV, NEURONS_CSV = "alignment.csv", "alignment_neurons.csv"


class Sink(Protocol):
    """Takes the reports of a run, one after the other."""

    def add(self, report: Report, step: int | None = None) -> None:
        """Take one report; step: its number in the run, the Monitor's own where not given."""

    def close(self) -> None:
        """Write what is left."""


def rows(report: Report, step: int | None = None) -> list[dict[str, Any]]:
    """One row of COLUMNS for each layer; None where there is a gap."""
    found = []
    for layer, measured in report.items():
        row: dict[str, Any] = {"step": measured["step"] if step is None else step, "layer": layer}
        for part in PARTS:
            numbers = measured[part] or {}
            row[f"{part}_cosine"] = numbers.get("cosine")
            row[f"{part}_inner"] = numbers.get("inner")
        row |= {name: measured[name] for name in NUMBERS}
        row["gaps"] = "; ".join(f"{name}: {why}" for name, why in measured["gaps"].items())
        found.append(row)
    return found


def neuron_rows(report: Report, step: int | None = None) -> list[tuple[Any, ...]]:
    """One row of NEURON_COLUMNS for each neuron and part; a neuron without a cosine has NaN."""
    return [
        (measured["step"] if step is None else step, layer, part, neuron, cosine)
        for layer, measured in report.items()
        for part in PARTS
        if measured[part]
        for neuron, cosine in enumerate(measured[part]["neurons"].tolist())
    ]


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a sink's CSV file; a last line that a killed process left half written is not
    one. ValueError if the file is of another kind."""
    columns = NEURON_COLUMNS if path.name == NEURONS_CSV else COLUMNS
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(complete)))
    if not lines or tuple(lines[0]) != columns:
        raise ValueError(f"{path}: expected the columns {', '.join(columns)}")
    return [dict(zip(columns, line, strict=True)) for line in lines[1:]]


class Csv:
    """alignment.csv in `directory`, a row for each layer, and with `neurons` one file for those.

    An existing file is continued; with `start`, rows from that step on are dropped, as a resumed
    run makes them again.
    """

    def __init__(
        self, directory: Path | str, neurons: bool = False, start: int | None = None
    ) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._layers = continue_csv(directory / LAYERS_CSV, COLUMNS, start)
        self._neurons: TextIO | None = None
        if neurons:
            self._neurons = continue_csv(directory / NEURONS_CSV, NEURON_COLUMNS, start)

    def add(self, report: Report, step: int | None = None) -> None:
        write_rows(self._layers, [list(row.values()) for row in rows(report, step)])
        if self._neurons is not None:
            write_rows(self._neurons, neuron_rows(report, step))

    def close(self) -> None:
        self._layers.close()
        if self._neurons is not None:
            self._neurons.close()


def continue_csv(path: Path, columns: Sequence[str], start: int | None) -> TextIO:
    """The file opened to append, with the rows that it had, of steps before `start` if that is
    given; replaced atomically."""
    kept = read_csv(path) if path.exists() else []
    if start is not None:
        kept = [row for row in kept if int(row["step"]) < start]
    text = io.StringIO()
    write_rows(text, [columns, *(list(row.values()) for row in kept)])
    write_text(path, text.getvalue())
    return path.open("a", newline="")


def write_rows(file: TextIO, lines: Sequence[Sequence[Any]]) -> None:
    csv.writer(file, lineterminator="\n").writerows(lines)
    file.flush()


class Parquet:
    """alignment.parquet in `directory`, written when closed: needs pyarrow, else ImportError."""

    def __init__(self, directory: Path | str) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise ImportError("Parquet needs pyarrow, which is not installed; Csv needs nothing")
        self._path = Path(directory) / "alignment.parquet"
        self._rows: list[dict[str, Any]] = []

    def add(self, report: Report, step: int | None = None) -> None:
        self._rows += rows(report, step)

    def close(self) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = pyarrow.Table.from_pylist(self._rows)
        write_atomic(self._path, lambda file: pyarrow.parquet.write_table(content, file))


class TensorBoard:
    """Scalars by layer, and histograms of its neurons' cosines, in `directory`.

    Needs tensorboard. start: events from that step on are hidden, everybody's in that directory, as
    a resumed run makes them anew.
    """

    def __init__(self, directory: Path | str, start: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=start)

    def add(self, report: Report, step: int | None = None) -> None:
        for row in rows(report, step):
            for name, value in row.items():
                if value is not None and name not in ("step", "layer", "gaps"):
                    tag = f"alignment/{name}/{row['layer']}"
                    self._writer.add_scalar(tag, value, row["step"])
        for layer, measured in report.items():
            at = measured["step"] if step is None else step
            for part in PARTS:
                cosines = measured[part]["neurons"] if measured[part] else None
                if cosines is not None and (finite := cosines[~cosines.isnan()]).numel():
                    self._writer.add_histogram(f"alignment/{part}_neurons/{layer}", finite, at)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Table:
    """The last report as a table in the terminal, in place; elsewhere one table after another."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._height = 0

    def add(self, report: Report, step: int | None = None) -> None:
        text = table(report, step)
        if self._height and self._stream.isatty():
            self._stream.write(f"\x1b[{self._height}F\x1b[J")
        self._stream.write(text + "\n")
        self._stream.flush()
        self._height = text.count("\n") + 1

    def close(self) -> None:
        self._height = 0


def table(report: Report, step: int | None = None) -> str:
    """A report as text: cosines, norm, shares and flips by layer, or why there are none."""
    return table_of_rows(rows(report, step))


def table_of_rows(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one step as text; `gaps` of a layer without any number is told."""
    width = max([len("layer"), *(len(row["layer"]) for row in found)])
    shown = ("batch_cosine", "sample_cosine", "update_cosine", *NUMBERS)
    titles = ("batch", "sample", "update", "norm", "hebbian", "anti", "flips")
    head = f"step {found[0]['step']}" if found else "no layers"
    lines = [head, f"{'layer':<{width}}" + "".join(f"{t:>9}" for t in titles)]
    for row in found:
        values = [row[name] for name in shown]
        if all(value in (None, "") for value in values[:3]):
            lines.append(f"{row['layer']:<{width}}  {row['gaps']}")
            continue
        cells = ("–" if v in (None, "") else short(float(v)) for v in values)
        lines.append(f"{row['layer']:<{width}}" + "".join(f"{c:>9}" for c in cells))
    return "\n".join(lines)


def short(value: float) -> str:
    """Three decimals, or three digits where those would not fit into a column."""
    return f"{value:.3f}" if abs(value) < 10_000 else f"{value:.2e}"


class Sinks:
    """Several sinks as one, closed at the end of a `with` block."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def add(self, report: Report, step: int | None = None) -> None:
        for sink in self._sinks:
            sink.add(report, step)

    def close(self) -> None:
        errors = []
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # a full disk's, say: the others are closed all the same
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
