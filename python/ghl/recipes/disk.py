"""A full disk costs what was being written, not the run."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError


@contextmanager
def told_if_full(lost: str) -> Iterator[None]:
    """Inside, a full disk ends what is being written and nothing else; `lost` says what that is."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"the disk is full ({error}): {lost}", flush=True)


class WhileRoom:
    """Hands rows on to a sink, which has `add` and `close`, for as long as the disk has room.

    Not after that: a row after half a row would be lost too.
    """

    def __init__(self, sink: Any, name: str) -> None:
        self.sink, self.name = sink, name

    def add(self, row: Any) -> None:
        """Hand one row on."""
        if self.sink is None:
            return
        with told_if_full(f"{self.name} is not recorded any more"):
            self.sink.add(row)
            return
        failed, self.sink = self.sink, None
        with suppress(OSError):
            failed.close()

    def close(self) -> None:
        """Write what is left."""
        if self.sink is not None:
            with told_if_full(f"the last of {self.name} is not recorded"):
                self.sink.close()
