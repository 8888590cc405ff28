"""Weights whose sums are complete before the backward that made them ends: merged many at once.

One by one, merges would be two launches a weight, for which a GPU waits longer than they take.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghl.guards import mark_update
from ghl.updates import updates
from ghl_kernels import Rule

MOST_BYTES = 64 * 2**20  # of G at once: as much memory again is H0's, and their updates'


class Complete(NamedTuple):
    """A weight of which all sums have arrived."""

    weight: nn.Parameter
    rule: Rule
    compute_dtype: torch.dtype
    G: Tensor
    H0: Tensor | None
    totals: Tensor | None

    @property
    def here(self) -> Tensor:
        return self.weight.detach()


@torch.no_grad()
def merge(complete: Sequence[Complete]) -> None:
    """Put the updates in the place of gradients, but of those that were taken away since."""
    for one, update in updates(complete):
        if one.weight.grad is one.G:
            mark_update(update)
            one.weight.grad = update


class Pending:
    """What awaits the end of one backward."""

    def __init__(self) -> None:
        self._complete: dict[Any, list[Complete]] = {}  # of each stream
        self._bytes: Counter[Any] = Counter()
        self._ends: list[Callable[[], None]] = []

    @staticmethod
    def here() -> Pending:
        """That of the backward which runs here. Nothing else refers to it than that backward: one
        that fails leaves nothing behind."""
        task = torch._C._current_graph_task_id()
        with _lock:  # devices have threads of their own
            pending = _of_task.get(task)
            if pending is None:
                pending = _of_task[task] = Pending()
                torch.autograd.Variable._execution_engine.queue_callback(pending._end)
        return pending

    def merge(self, complete: Complete) -> None:
        """At the end at the latest, which is when streams have waited for each other."""
        G = complete.G
        stream = torch.cuda.current_stream(G.device) if G.is_cuda else None
        self._complete.setdefault(stream, []).append(complete)
        self._bytes[stream] += G.nbytes
        if self._bytes[stream] >= MOST_BYTES:
            del self._bytes[stream]
            merge(self._complete.pop(stream))

    def at_end(self, check: Callable[[], None]) -> None:
        """Have something called behind the merges."""
        self._ends.append(check)

    def _end(self) -> None:
        for alike in self._complete.values():
            merge(alike)
        self._complete.clear()
        for check in self._ends:
            check()


_lock = threading.Lock()
_of_task: weakref.WeakValueDictionary[int, Pending] = weakref.WeakValueDictionary()
