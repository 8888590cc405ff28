"""Files that a killed process cannot leave half written."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomic(path: Path, write: Callable[[IO[bytes]], object], shared: bool = False) -> None:
    """Replace `path` by what `write` puts out; a kill leaves all of the old or of the new.

    shared: others, threads or processes, may replace it at the same time.
    """
    own = f".{uuid.uuid4().hex}" if shared else ""  # else a later run overwrites what a kill left
    partial = path.with_name(f"{path.name}{own}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)  # a full disk has no room for half a file
        raise
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(path: Path, text: str, shared: bool = False) -> None:
    """Replace `path` by `text`, atomically."""
    write_atomic(path, lambda file: file.write(text.encode()), shared)
