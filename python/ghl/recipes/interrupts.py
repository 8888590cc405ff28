"""Interrupts that are not lost: Python discards them in finalizers, as in that of a loader worker.

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
def heard(*signals: int) -> Iterator[None]:
    """Around a run: these signals interrupt it, Ctrl-C if none is given; one that is ignored, as in
    a shell's background, stays so. What fails because its workers were interrupted too is an
    interruption."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = signals or (signal.SIGINT,)
    before = {n: h for n in wanted if (h := signal.getsignal(n)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, ask)
    try:
        yield
        check()
    except RuntimeError as error:
        if _asked.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
