"""The alignment of a run of `ghl train`, into the files of its directory.

What is measured is `ghl.alignment`'s; here is when, and that the files go on with a resumed run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ghl.alignment import Monitor
from ghl.alignment.sinks import Csv, Sinks, TensorBoard
from ghl.layers import Plastic
from ghl.recipes.disk import WhileRoom
from ghl.recipes.trainer import Trainer


@contextmanager
def recorded(trainer: Trainer, out: Path) -> Iterator[None]:
    """Inside, the trainer's steps are measured as --align-every says, and the main process writes.

    Without it, nothing. ValueError if the network has no layer to measure.
    """
    config = trainer.config
    if config.align_every is None:
        yield
        return
    start = trainer.schedule.last_epoch
    with Monitor(trainer.model, every=config.align_every, start=start) as monitor:
        sinks = Sinks()
        if trainer.world.main:
            sinks = Sinks(
                Csv(out, neurons=config.align_neurons, start=start),
                TensorBoard(out / "tensorboard" / "alignment", start),
            )
        recording = Recording(trainer, monitor, WhileRoom(sinks, "alignment"))
        trainer.around_step = recording.step
        try:
            yield
        finally:
            recording.sink.close()


class Recording:
    """Takes the Monitor's report after each measured step to `sink`."""

    def __init__(self, trainer: Trainer, monitor: Monitor, sink: WhileRoom) -> None:
        self.trainer, self.monitor, self.sink = trainer, monitor, sink

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step, whose optimizer's a GradScaler may leave out: then it has gaps."""
        step, measured = self.monitor.steps, self.monitor.measuring
        scale = self.trainer.scaler.get_scale() if measured else 1.0
        with self.monitor.eagerly():
            yield
        if self.monitor.steps == step:
            self.monitor.step()
        if measured and self.trainer.world.main:
            report = self.monitor.report()
            self.sink.add(report if scale == 1 else unscaled(report, self.trainer.model, scale))


def unscaled(
    report: dict[str, dict[str, Any]], model: nn.Module, scale: float
) -> dict[str, dict[str, Any]]:
    """A report with the inner products of the loss's gradients divided by a GradScaler's scale.

    An update made by a rule, or by the optimizer, does not have it.
    """
    modules = dict(model.named_modules())
    found = {}
    for name, measured in report.items():
        layer = modules.get(name)
        ruled = isinstance(layer, Plastic) and layer.rule.makes_update
        found[name] = dict(measured)
        for part in () if ruled else ("batch", "sample"):
            if numbers := measured[part]:
                found[name][part] = numbers | {"inner": numbers["inner"] / scale}
    return found
