"""One weight over the steps of a training run: what is kept from step to step, and the last result.

What the end of a step computes, for many weights at once, is in `ending.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghl.alignment.statistics import Measurement, of_samples
from ghl.alignment.sums import Sums
from ghl.alignment.targets import Target
from ghl.guards import is_update
from ghl_kernels import Rule


class Track:
    """The steps of one target; `sums` are those of the step in progress."""

    def __init__(
        self,
        target: Target,
        rule: Rule,
        batch: bool,
        sample: bool,
        mean_loss: bool,
        takes_signals: bool,
        start: int = 0,
    ) -> None:
        self.target, self.rule = target, rule
        self.batch, self.sample, self.mean_loss = batch, sample, mean_loss
        self.takes_signals = takes_signals
        self.steps = start
        self.last: Measurement | None = None
        self.before: Tensor | None = None  # the weight before the optimizer's step
        self.signs: Tensor | None = None  # of weight.grad in the step before, int8
        self._given = False
        self.waits = False  # for a first step, while other weights have made many
        self.sums = self._new_sums()

    @property
    def gathers(self) -> bool:
        """Whether the signal is what backwards leave in weight.grad, and not a rule's."""
        return not (self.target.ruled or self.takes_signals or self.target.gap)

    def _new_sums(self) -> Sums:
        weight = self.target.weight
        shape: Any = torch.empty(0, 0) if weight is None or self.target.gap else weight
        sample = self.sample and not self.target.ruled
        has_signal = self.gathers or self.takes_signals
        return Sums(shape, self.rule, self.batch, sample, has_signal)

    def accumulated(self, weight: Tensor) -> None:
        """A backward has added to weight.grad."""
        self.sums.accumulated.add(torch._C._current_graph_task_id())

    @property
    def weight(self) -> Tensor:
        """Of a target without a gap."""
        assert self.target.weight is not None
        return self.target.weight

    @property
    def grad(self) -> Tensor | None:
        weight = self.target.weight
        return None if weight is None else weight.grad

    @property
    def signal(self) -> Tensor | None:
        """-S (K, ...): of the backwards, as given, or the update of a rule."""
        return self.grad if self.target.ruled else self.sums.G

    @property
    def of_sum(self) -> bool:
        """Whether the signal is a sum over rows, of which the mean is meant."""
        return not (self.mean_loss or self.target.ruled or self._given)

    def is_measured(self, every: int, ahead: int = 0) -> bool:
        """Whether the step in progress is, or the one `ahead` of it."""
        return not self.waits and (self.steps + ahead) % every == 0

    def begin(self) -> None:
        """A forward: gradients that zero_grad has dropped do not count, nor do forwards before."""
        backward = torch._C._current_graph_task_id() != -1
        if self.takes_signals or backward:
            return
        if (self.sums.answered or self.sums.fault) and self.grad is None:
            self.sums.reset()

    def arrives(self, recomputed: bool) -> None:
        """A gradient, before it is added: in a backward's first, those that zero_grad has dropped
        since the last do not count. recomputed: of a use by activation checkpointing, which may be
        one within a backward that has not reached weight.grad yet."""
        task, sums = torch._C._current_graph_task_id(), self.sums
        if task in sums.arrived:
            return
        if sums.answered and (sums.arrived <= sums.accumulated if self.gathers else not recomputed):
            if self.grad is None:
                sums.reset(max(0, sums.uses - sums.answered))
            else:
                sums.note_zeroed(self.grad)
        sums.arrived.add(task)

    def wait(self) -> None:
        """Gather nothing until an optimizer steps with the weight."""
        self.waits, self.sums = True, self._new_sums()

    def give(self, signal: Tensor) -> None:
        """Add to the signal of a rule: what it adds to the weight, so less a gradient."""
        G = -signal.detach().to(self.sums.dtype)
        held = self.sums.G
        self.sums.G = held + G if self._given and held is not None else G
        self._given = True

    def reported(self, every: int, alone: bool) -> Measurement | None:
        """The last measured step's; None where the one in progress is, and has yet to be measured.

        That is once its backward has run. alone: whether no other rank adds to it.
        """
        stepping = self.before is not None
        in_progress = self.is_measured(every) and self.sums.answered > 0 and not stepping
        if alone and (in_progress or self.last is None):
            if in_progress and self.target.ruled and not is_update(self.grad):
                gap = "its update is made in optimizer.step(): report after it"
                return Measurement(self.steps, gaps={"layer": gap})
            return None
        if self.last is not None:
            return self.last
        gap = self.target.gap or "no step has ended yet"
        return Measurement(self.steps, gaps={"layer": gap})

    def next_step(self) -> None:
        self.before, self.waits = None, False
        self.steps += 1
        self._given = False
        self.sums = self._new_sums()

    def problem(self) -> str | None:
        """Why the sums of this step must not be reported."""
        sums = self.sums
        if self.target.gap or sums.problem or sums.fault:
            return self.target.gap or sums.problem or sums.fault
        if self.waits:
            return "no optimizer has made a step with it"
        if self.target.swapped_since():
            return "was swapped after the Monitor was attached: attach it anew"
        if sums.uses == 0 and sums.answered == 0:
            return (
                "did not run in training (or is hidden: by torch.compile, see Monitor.eagerly, or "
                "by code that uses its weight without it)"
            )
        if sums.answered == 0:
            return "ran, but no gradient reached its output"
        if self.gathers and not sums.arrived <= sums.accumulated:
            return "a gradient went through it that did not reach weight.grad (autograd.grad?)"
        if self.gathers and self.grad is None:
            return "weight.grad is None: its gradients were dropped"
        if sums.answered < sums.uses:
            return f"{sums.uses - sums.answered} of {sums.uses} uses received no gradient"
        if self.takes_signals and not self._given:
            return "ran, but measure() was given no signal"
        return None

    def finding(self) -> Measurement:
        """What the step says without a pass over the weight's numbers."""
        found = Measurement(self.steps, zeroed=self.sums.zeroed)
        if problem := self.problem():
            found.gaps = {"layer": problem}
            return found
        found.elsewhere = self.sums.elsewhere
        found.gaps["update"] = "no optimizer has made a step with it"
        found.gaps["sign_flips"] = "the step has not ended"
        if not self.batch:
            found.gaps["update"] = "needs statistic='batch' or 'both'"
        elif self.sums.H0 is None:
            found.gaps["batch"] = "there is no Hebbian direction of this step"
        elif self.signal is None:
            found.gaps["batch"] = "weight.grad is None, though a rule trains the layer"
        if self.sums.sample and self.sums.sample_problem is None:
            found.parts["sample"] = of_samples(self.sums, self.mean_loss)
        elif self.takes_signals:
            found.gaps["sample"] = "a signal that is given is of the whole batch"
        elif not self.sample:
            found.gaps["sample"] = "needs statistic='sample' or 'both'"
        else:
            rule = "its signal is made of the whole batch by a rule"
            found.gaps["sample"] = self.sums.sample_problem or rule
        return found
