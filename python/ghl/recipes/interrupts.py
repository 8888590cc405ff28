"""Ctrl-C that is not lost: Python discards it in finalizers, as in that of a loader's workers.

What was asked is remembered, and looked at again between steps.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


def ask(number: int, frame: FrameType | None) -> None:
    """The handler of the signal."""
    _asked.set()
    raise KeyboardInterrupt


def check() -> None:
    """Raise KeyboardInterrupt if one was asked for and did not arrive."""
    if _asked.is_set():
        raise KeyboardInterrupt


@contextmanager
def heard() -> Iterator[None]:
    """Around a run: what fails because its workers were interrupted too is an interruption."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    except RuntimeError as error:
        if _asked.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
