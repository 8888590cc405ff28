"""The report of `ghl reproduce`: our numbers beside the published ones, in Markdown and HTML.

Experiments hand over sections; how their numbers came about is theirs.
"""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ghl_kernels.files import write_text

HEAD = (
    "# Hebbian dynamics in regularized learning, reproduced",
    "The experiments of arXiv 2505.18069. *Alignment* is the cosine of the learning signal "
    "S = −∂ℓ/∂W, without weight decay, and the Hebbian direction B = h_b h_aᵀ, both means over a "
    "batch; positive is Hebbian. Published figures are from a secondary source.",
)
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.3em .7em}"
    "img{max-width:100%}"
)


@dataclass
class Section:
    """One experiment: a table of strings with its head, a figure's file name, paragraphs."""

    title: str
    text: list[str]
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    figure: str | None = None
    notes: list[str] = field(default_factory=list)


def write(out: Path, sections: Sequence[Section]) -> None:
    """Write report.md and report.html into `out`, atomically.

    A report that is there keeps its sections of other experiments, in the order of their numbers.
    """
    path = out / "report.md"
    held = read(path.read_text()) if path.is_file() else []
    titles = {section.title for section in sections}
    together = [*sections, *(section for section in held if section.title not in titles)]
    places = {section.title: place for place, section in enumerate(held)}
    together.sort(key=lambda s: (number(s.title), places.get(s.title, len(places))))
    write_text(path, markdown(together))
    write_text(out / "report.html", page(together))


def number(title: str) -> float:
    """The experiment's number, with which its section's title begins."""
    first = title.partition(".")[0]
    return int(first) if first.isdigit() else math.inf


def read(text: str) -> list[Section]:
    """The sections that `markdown` has written."""
    found = []
    for block in text.split("\n\n## ")[1:]:
        title, *parts = block.removesuffix("\n").split("\n\n")
        section = Section(title, [])
        for part in parts:
            if part.startswith("| "):
                lines = [line[2:-2].split(" | ") for line in part.split("\n")]
                section.head, section.rows = lines[0], lines[2:]
            elif part.startswith(f"![{title}]("):
                section.figure = part.removeprefix(f"![{title}](").removesuffix(")")
            elif part.startswith("- "):
                section.notes.append(part.removeprefix("- "))
            else:
                section.text.append(part)
        found.append(section)
    return found


def markdown(sections: Sequence[Section]) -> str:
    parts = [*HEAD]
    for s in sections:
        parts += [f"## {s.title}", *s.text]
        if s.rows:
            lines = [s.head, ["---"] * len(s.head), *s.rows]
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        if s.figure:
            parts.append(f"![{s.title}]({s.figure})")
        parts += [f"- {note}" for note in s.notes]
    return "\n\n".join(parts) + "\n"


def page(sections: Sequence[Section]) -> str:
    def tag(name: str, text: str) -> str:
        return f"<{name}>{html.escape(text)}</{name}>"

    def row(cells: Sequence[str], name: str) -> str:
        return "<tr>" + "".join(tag(name, c) for c in cells) + "</tr>"

    parts = [tag("h1", HEAD[0].removeprefix("# ")), tag("p", HEAD[1].replace("*", ""))]
    for s in sections:
        parts += [tag("h2", s.title), *(tag("p", t) for t in s.text)]
        if s.rows:
            body = "".join(row(r, "td") for r in s.rows)
            parts.append(f"<table>{row(s.head, 'th')}{body}</table>")
        if s.figure:
            parts.append(f'<p><img src="{html.escape(s.figure)}" alt="{html.escape(s.title)}"></p>')
        if s.notes:
            parts.append("<ul>" + "".join(tag("li", n) for n in s.notes) + "</ul>")
    head = f'<meta charset="utf-8"><title>{HEAD[0][2:]}</title><style>{STYLE}</style>'
    return (
        f"<!doctype html>\n<html><head>{head}</head><body>\n"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Replace a CSV file, atomically; floats in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value); NaN if any value is."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
