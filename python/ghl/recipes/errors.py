"""Wording of the errors that a user's input can cause: argument, value, expectation.

What is valid is decided where the value is used; nothing here knows a particular option.
"""

import math
from collections.abc import Collection
from pathlib import Path

from ghl_kernels import rule


def option(field: str) -> str:
    """The command line's spelling of a setting: `lr_hebb` is `--lr-hebb`."""
    return "--" + field.replace("_", "-")


def check_choice(field: str, value: str, known: Collection[str]) -> None:
    """Raise a ValueError that names the nearest of `known` unless `value` is one of them."""
    rule.check_choice(option(field), value, known)


def check_integer(field: str, value: int, smallest: int, below: float = math.inf) -> None:
    """Raise a ValueError unless `value` is an integer of at least `smallest` and under `below`."""
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < below:
        bound = f"of at least {smallest}" + (f" and below {below}" if below != math.inf else "")
        raise ValueError(f"{option(field)} {value!r}: expected an integer {bound}")


def check_number(field: str, value: float, *, zero: bool = False, below: float = math.inf) -> None:
    """Raise a ValueError unless `value` is above 0 (at least 0 with `zero`) and under `below`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < below or (value == 0 and not zero):
        bound = "of at least 0" if zero else "above 0"
        if below != math.inf:
            bound += f" and below {below:g}"
        raise ValueError(f"{option(field)} {value!r}: expected a finite number {bound}")


def inside(directory: Path, name: str) -> str:
    """The end of an error about a file that is not there: which of the runs inside have one."""
    runs = sorted(path.parent.name for path in directory.glob(f"*/{name}"))
    return f"; the runs inside have one: {', '.join(runs)}" if runs else ""
