"""One weight over the steps of a training run: what is kept from step to step, and the last result.

A step is measured between `begin` and `close`; the optimizer's own part ends with `after`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghl.alignment import statistics
from ghl.alignment.statistics import Measurement
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
        self._before: Tensor | None = None  # the weight before the optimizer's step
        self._signs: Tensor | None = None  # of weight.grad in the step before
        self._given = False
        self.sums = self._new_sums()

    @property
    def gathers(self) -> bool:
        """Whether the signal is what backwards leave in weight.grad, and not a rule's."""
        return not (self.target.ruled or self.takes_signals or self.target.gap)

    def _new_sums(self) -> Sums:
        weight = self.target.weight
        shape: Any = torch.empty(0, 0) if weight is None or self.target.gap else weight
        sample = self.sample and not self.target.ruled
        return Sums(shape, self.rule, self.batch, sample, self.gathers)

    def accumulated(self, weight: Tensor) -> None:
        """A backward has added to weight.grad."""
        self.sums.accumulated.add(torch._C._current_graph_task_id())

    @property
    def grad(self) -> Tensor | None:
        weight = self.target.weight
        return None if weight is None else weight.grad

    def begin(self) -> None:
        """A forward: gradients that zero_grad has dropped since do not count."""
        backward = torch._C._current_graph_task_id() != -1
        if self.takes_signals or backward:
            return
        if not self.sums.answered:
            return
        if self.grad is None:
            problem, self.sums = self.sums.problem, self._new_sums()
            self.sums.problem = problem
        else:
            self.sums.note_zeroed(self.grad)

    def give(self, signal: Tensor) -> None:
        """Add to the signal of a rule: what it adds to the weight, so less a gradient."""
        G = -signal.detach().to(self.sums.dtype)
        held = self.sums.G
        self.sums.G = held + G if self._given and held is not None else G
        self._given = True

    def measurement(self, every: int, alone: bool) -> Measurement:
        """Of the step in progress where its backward has run, else of the last one measured."""
        stepping = self._before is not None
        in_progress = self.steps % every == 0 and self.sums.answered > 0 and not stepping
        if alone and (in_progress or self.last is None):
            if in_progress and self.target.ruled and not is_update(self.grad):
                gap = "its update is made in optimizer.step(): report after it"
                return Measurement(self.steps, gaps={"layer": gap})
            return self._measure()
        if self.last is not None:
            return self.last
        gap = self.target.gap or "no step has ended yet"
        return Measurement(self.steps, gaps={"layer": gap})

    def close(self, every: int, distributed: bool, update: bool = False) -> None:
        """The end of a step, before the optimizer changes the weight."""
        measured = self.steps % every == 0
        if measured and not self.target.gap:
            if distributed:
                self.sums.problem = self._problem() or self.sums.sample_problem
                self.sums.reduce(self.mean_loss)
            self.last = self._measure()
            if update and "batch" in self.last.parts:
                assert self.target.weight is not None
                self._before = self.sums.in_place_of_signal(self.target.weight.detach())
        elif measured:
            self.last = self._measure()
        self._take_signs(measured, every)

    def _take_signs(self, measured: bool, every: int) -> None:
        if self.target.gap or not (measured or (self.steps + 1) % every == 0):
            self._signs = None
            return
        now = None if self.grad is None else self.grad.sign().to(torch.int8)
        if measured and self.last is not None:
            if now is None:
                self.last.gaps["sign_flips"] = "weight.grad is None"
            elif self._signs is None:
                self.last.gaps["sign_flips"] = "there is no gradient of the step before"
            else:
                self.last.sign_flips = statistics.flips(self._signs, now)
                self.last.gaps.pop("sign_flips", None)
        self._signs = now if (self.steps + 1) % every == 0 else None

    @torch.no_grad()
    def after(self, optimizer: Any) -> None:
        """The end of a step, after the optimizer has changed the weight."""
        if self._before is not None and self.last is not None and self.target.weight is not None:
            change = self.target.weight.detach() - self._before
            self.last.parts["update"] = statistics.of_batch(change, self.sums, self._before)
            self.last.gaps.pop("update", None)
        self._before = None
        self.steps += 1
        self._given = False
        self.sums = self._new_sums()

    def _problem(self) -> str | None:
        """Why the sums of this step must not be reported."""
        sums = self.sums
        if self.target.gap or sums.problem:
            return self.target.gap or sums.problem
        if self.target.swapped_since():
            return "was swapped after the Monitor was attached: attach it anew"
        if sums.uses == 0 and sums.answered == 0:
            return "did not run in training (nor in eager mode: torch.compile hides layers)"
        if sums.answered == 0:
            return "ran, but no gradient reached its output"
        if self.gathers and not sums.arrived <= sums.accumulated:
            return "a gradient went through it that did not reach weight.grad (autograd.grad?)"
        if sums.answered < sums.uses:
            return f"{sums.uses - sums.answered} of {sums.uses} uses received no gradient"
        if self.takes_signals and not self._given:
            return "ran, but measure() was given no signal"
        return None

    @torch.no_grad()
    def _measure(self) -> Measurement:
        weight = self.target.weight
        found = Measurement(self.steps, zeroed=self.sums.zeroed)
        found.gaps["update"] = "no optimizer has made a step with it"
        found.gaps["sign_flips"] = "the step has not ended"
        problem = self._problem()
        if weight is not None and not self.target.gap:
            found.weight_norm = weight.detach().norm()
        if problem:
            found.gaps = {"layer": problem}
            return found
        assert weight is not None
        self._measure_parts(found, weight.detach())
        return found

    def _measure_parts(self, found: Measurement, weight: Tensor) -> None:
        sums, ruled = self.sums, self.target.ruled
        found.elsewhere = sums.elsewhere
        if not self.batch:
            found.gaps["update"] = "needs statistic='batch' or 'both'"
        elif sums.H0 is None:
            found.gaps["batch"] = "there is no Hebbian direction of this step"
        else:
            signal = self.grad if ruled else sums.G
            if signal is None:
                found.gaps["batch"] = "weight.grad is None, though a rule trains the layer"
            else:
                of_sum = not (self.mean_loss or ruled or self._given)
                found.parts["batch"] = statistics.of_batch(signal, sums, weight, -1, of_sum)
        if sums.sample and sums.sample_problem is None:
            found.parts["sample"] = statistics.of_samples(sums, self.mean_loss)
        elif self.sample:
            rule = "its signal is made of the whole batch by a rule"
            found.gaps["sample"] = sums.sample_problem or rule
