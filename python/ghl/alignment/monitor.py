"""The Monitor: which steps are measured, what the hooks of a step add up to, the report.

Trains nothing and changes nothing; which weights there are is in `targets.py`, arithmetic in
`sums.py`, `samples.py`, `ending.py` and `statistics.py`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import ghl_kernels.ops  # noqa: F401  registers torch.ops.ghl_kernels
from ghl.alignment import ending, hooks
from ghl.alignment.attention import Projections
from ghl.alignment.statistics import to_numbers
from ghl.alignment.steps import Steps
from ghl.alignment.sums import Use
from ghl.alignment.targets import Target, find_targets
from ghl.alignment.track import Track
from ghl.hooks import Hook, Switched, weak
from ghl.layers import check_module
from ghl_kernels import Rule
from ghl_kernels.rule import check_choice

DIRECTIONS = {
    "hebb": Rule(competition="linear", decay="none"),
    "oja": Rule(competition="linear", decay="oja"),
    "ghl": Rule(),
}
STATISTICS = {"batch": (True, False), "sample": (False, True), "both": (True, True)}
CHANGED = "its output was changed by a hook, or its forward replaced"
PATIENCE = 10  # steps of others until a weight that makes none is not measured any more
_monitored: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Monitor]] = weakref.WeakKeyDictionary()


class Monitor:
    """Measures every `every`-th step of a model's training, from the first (arXiv 2505.18069).

    S = −∂ℓ/∂W, without weight decay; for a layer that ghl.swap gave a rule, what the rule adds.
    B = h_b h_aᵀ: a layer's input h_a, its output h_b without bias. Positive is Hebbian. S is
    that of the layer's own uses: not of a penalty on its weight, nor of other code that takes it.

    hebbian: the direction B: `hebb`, `oja` (B less its decay), `ghl`, or a Rule, of which
        competition, tau and decay count. A competition sees the output with bias.
    statistic: `batch` (cosine of means), `sample` (mean of cosines), `both`. A row is a sample:
        a token or an output position counts as one.
    loss: whether the loss is a `mean` over rows (of a rank) or a `sum`; it scales inner products.
    signal: `autograd`, or `given` where a learning rule hands it to `measure`.
    distributed: sum over all ranks of the process group, if there is one: each must have such a
        Monitor then, or none comes to an end, and run the same model on measured steps. False where
        ranks train models of their own, or one alone measures its own part.
    start: the number of the first step, where a run goes on: steps 0, every, 2 every are measured.

    Under a GradScaler inner products are those of the scaled loss; cosines are not affected. Under
    torch.compile a step's forwards and backwards have to be inside of `eagerly()`.

    A step ends with `optimizer.step()` of the optimizer that has the weight, or with `step()`; all
    backwards until then add up, but for what zero_grad has dropped. A step that a GradScaler leaves
    out is none, unless the optimizer is a fused one; a weight that no optimizer has waits, from the
    tenth step of the others on. Also under activation checkpointing, a layer's input and output are
    kept until its gradient has come. With the batch statistic a measured step keeps two tensors of
    the weight's size, H0 and G, in whose place W is kept while the optimizer steps; `sign_flips`
    needs the step before's signs, in int8. The other steps keep nothing, and have no hooks in
    layers.
    Raises ValueError or TypeError, naming the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        hebbian: str | Rule = "hebb",
        statistic: str = "both",
        loss: str = "mean",
        signal: str = "autograd",
        distributed: bool = True,
        start: int = 0,
    ) -> None:
        check_module(model)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}, must be an integer of at least 1")
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"start is {start!r}, must be an integer of at least 0")
        if not isinstance(hebbian, Rule):
            check_choice("hebbian", hebbian, DIRECTIONS)
            hebbian = DIRECTIONS[hebbian]
        check_choice("statistic", statistic, STATISTICS)
        check_choice("loss", loss, ("mean", "sum"))
        check_choice("signal", signal, ("autograd", "given"))
        targets = find_targets(model)
        check_free(targets)
        batch, sample = STATISTICS[statistic]
        self.every, self.given, self._start = every, signal == "given", start
        self._distributed = distributed
        self._tracks = [
            Track(t, hebbian, batch, sample and not self.given, loss == "mean", self.given, start)
            for t in targets
        ]
        self._by_name = {name: track for track in self._tracks for name in track.target.names}
        self._by_weight = {
            id(t.target.weight): t for t in self._tracks if t.target.weight is not None
        }
        self._attention: list[Projections | None] = []
        self._steps = Steps(
            weak(self, "_of"), weak(self, "_gradients_made"), weak(self, "_step_ended")
        )
        for module in dict.fromkeys(m for target in targets for m in target.classes):
            _monitored[module] = weakref.ref(self)
        self._accumulating = dict(self._hooks_of_weights())
        self._switches, attention = self._hooks_of_layers()
        self._switched: list[bool] = []  # of each track, for which steps hooks have been turned
        self._turn_switches()
        switches = (*self._accumulating.values(), *(switch for switch, _ in self._switches))
        self._handles = [attention, *(s.handles for s in switches)]
        weakref.finalize(self, take_off, self._handles).atexit = False

    def _hooks_of_weights(self) -> Iterator[tuple[Track, Switched]]:
        for track in self._tracks:
            if track.target.weight is not None and track.gathers:
                done = Hook(weak(track, "accumulated"))
                register = track.target.weight.register_post_accumulate_grad_hook
                yield track, Switched(partial(register, done))

    def _hooks_of_layers(self) -> tuple[list[tuple[Switched, list[Track]]], list[Any]]:
        """The hooks that measured steps need, with the tracks that need them; those of attention,
        which come in pairs, are there on all steps."""
        of_module: dict[nn.Module, list[Track]] = {}
        for track in self._tracks:
            # no hook where nothing can be measured: reading a parametrized weight would change it
            for module in track.target.classes if track.target.gap is None else ():
                of_module.setdefault(module, []).append(track)
        switches, attention = [], []
        for module, tracks in of_module.items():
            if isinstance(module, nn.MultiheadAttention):
                enter, leave = (Hook(weak(self, n)) for n in ("_enter", "_leave"))
                attention.append(module.register_forward_pre_hook(enter))
                attention.append(module.register_forward_hook(leave, always_call=True))
            else:
                hook = Hook(weak(self, "_after_forward"))
                register = partial(module.register_forward_hook, hook, with_kwargs=True)
                switches.append((Switched(register), tracks))
        return switches, attention

    def _turn_switches(self) -> None:
        """Hooks are on where the step in progress is measured, and nowhere else: a call of a layer
        that has some takes a GPU's host as long as a small kernel. A weight's is turned on by a
        forward, that of a frozen one never."""
        measured = [track.is_measured(self.every) for track in self._tracks]
        if measured != self._switched:
            self._switched = measured
            for switch, tracks in self._switches:
                switch.turn(any(track.is_measured(self.every) for track in tracks))
            for track, switch in self._accumulating.items():
                if not track.is_measured(self.every):
                    switch.turn(False)

    def remove(self) -> None:
        """Take every hook off; the last report stays readable."""
        self._steps.remove()
        take_off(self._handles)
        while self._attention:  # of forwards that a KeyboardInterrupt ended, which calls no hooks
            if (mode := self._attention.pop()) is not None:
                mode.leave()
        self._switches, self._accumulating = [], {}
        for track in self._tracks:
            for module in track.target.classes:
                if (owner := _monitored.get(module)) is not None and owner() is self:
                    del _monitored[module]

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()

    @property
    def measuring(self) -> bool:
        """Whether the step in progress is measured."""
        return any(t.is_measured(self.every) for t in self._tracks if t.target.gap is None)

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Around a step's forwards and backwards, where torch.compile has compiled some of them:
        on a measured step they run uncompiled, because layers in a graph cannot be seen.

        The other steps stay compiled; a measured one takes the time and memory of eager mode, and
        rounds as that does. Evaluations belong inside too: what is compiled while layers have hooks
        is compiled once more when they have none.
        """
        if self.measuring and "torch._dynamo" in sys.modules:  # without which nothing is compiled
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield

    @property
    def steps(self) -> int:
        """The number of the step in progress; where optimizers differ, of the furthest weight."""
        return max(track.steps for track in self._tracks)

    def report(self) -> dict[str, dict[str, Any]]:
        """The last measured step, by name of the layer; waits for the device.

        Of each layer, after arXiv 2505.18069: `batch`, of the sums S and B over rows of the signal
        −∂ℓ/∂W and of the Hebbian direction h_b h_aᵀ; `sample`, of the mean of ⟨S, B⟩ of rows;
        `update`, of B and W after − W before the optimizer's step. Each is {cosine, inner (sums
        over rows divided by their number), neurons: (K) cosines on the CPU, NaN where there is
        none}. Beside them `weight_norm`; `hebbian_share` and `anti_hebbian_share`, of the neurons
        of `batch`, without it of `sample`; `sign_flips` (the share of entries of weight.grad that
        changed their sign since the step before); `step`; `gaps`, a reason for all that is None.
        """
        alone = not self._is_distributed()
        reported = {track: track.reported(self.every, alone) for track in self._tracks}
        fresh = ending.measure([track for track, found in reported.items() if found is None])
        found = to_numbers([reported[track] or fresh[track] for track in self._tracks])
        numbers = dict(zip(self._tracks, found, strict=True))
        return {name: numbers[track] for name, track in self._by_name.items()}

    def measure(self, name: str, signal: Tensor) -> None:
        """Take `signal`, of the weight's shape, as what a rule adds to the weight before decay.

        For rules that do not come from autograd: a Monitor with signal="given" has the Hebbian
        direction from the forwards in training mode. Several signals of a step add up, those of
        several ranks are averaged; on steps that are not measured nothing happens. Raises
        KeyError, TypeError, ValueError or RuntimeError.
        """
        if not self.given:
            raise RuntimeError("signal is 'autograd', must be 'given' for measure(): make it anew")
        if name not in self._by_name:
            raise KeyError(f"name is {name!r}, must be one of {', '.join(self._by_name)}")
        if not isinstance(signal, Tensor) or signal.layout != torch.strided:
            what = signal.layout if isinstance(signal, Tensor) else type(signal).__name__
            raise TypeError(f"signal is {what}, must be a dense Tensor")
        track = self._by_name[name]
        weight = track.target.weight
        if weight is not None and signal.shape != weight.shape:
            raise ValueError(
                f"signal has shape {tuple(signal.shape)}, must be {tuple(weight.shape)} like the "
                f"weight of {name!r}"
            )
        if track.is_measured(self.every):
            track.give(signal)

    def step(self) -> None:
        """End a step by hand, before gradients are dropped, where no torch.optim optimizer does;
        `update` is then a gap."""
        ending.close(self._tracks, self.every, self._is_distributed())
        ending.after(self._tracks)
        self._turn_switches()

    def _is_distributed(self) -> bool:
        ready = self._distributed and dist.is_available() and dist.is_initialized()
        return ready and dist.get_world_size() > 1

    def _after_forward(self, module: nn.Module, args: tuple, *called: Any) -> None:
        if len(called) < 2:  # turned off since torch took the list of hooks
            return
        kwargs, y = called
        weight = module._parameters.get("weight")
        track = self._by_weight.get(id(weight))
        if track is None or weight is None:
            for other in self._tracks:
                if module in other.target.classes and other.is_measured(self.every):
                    other.sums.problem = "its weight is another one than when the Monitor was made"
            return
        if not track.is_measured(self.every):
            return
        x = args[0] if args else kwargs.get("input")
        if track.target.gap is not None:
            return
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            track.sums.problem = "its forward is not from one tensor to another"
        elif self._wanted(track, module, y):
            if "forward" in module.__dict__ and not track.target.ruled:
                track.sums.problem = CHANGED
            self._watch(track, hooks.use_of(module, x, y, weight), y, module.training)

    def _wanted(self, track: Track, module: nn.Module, y: Tensor) -> bool:
        """Whether this forward is one of training; evaluation without gradients is none."""
        if track.target.swapped_since():
            track.sums.problem = "was swapped after the Monitor was attached: attach it anew"
            return False
        return module.training if self.given else torch.is_grad_enabled() and y.requires_grad

    def _watch(self, track: Track, use: Use, y: Tensor, training: bool) -> None:
        track.begin()
        sums = track.sums
        if self.given:
            sums.uses += 1
            sums.add(use, None)
            return
        recomputed = torch._C._current_graph_task_id() != -1  # by activation checkpointing
        sums.uses += training and not recomputed  # of an evaluation no gradient need come
        if use.leaf.requires_grad and track in self._accumulating:
            self._accumulating[track].turn(True)
        if not use.leaf.requires_grad:
            sums.problem = "its weight is frozen"
        elif not track.target.ruled and not hooks.is_product(use, y):
            sums.problem = CHANGED

        def arrive(g: Tensor, G: Tensor | None) -> None:
            if sums is not track.sums:
                track.sums.fault = "a gradient came through a forward of an earlier step"
                return
            if not use.leaf.requires_grad:  # frozen since: no gradient is added
                sums.uses -= training and not recomputed
                return
            track.arrives(recomputed)
            if not training:
                sums.fault = "ran in evaluation mode: call model.train()"
            if torch.is_grad_enabled():
                sums.problem = "backward(create_graph=True) makes signals that are not seen"
            sums.add(use, g, G)

        hooks.on_gradient(use, y, arrive)

    def _enter(self, module: nn.MultiheadAttention, args: tuple) -> None:
        observed = module.training if self.given else torch.is_grad_enabled()
        measured = any(self._switched) and any(
            track.is_measured(self.every) and module in track.target.classes
            for track in self._tracks
        )
        mode = Projections(partial(self._projection, module)) if observed and measured else None
        self._attention.append(mode)
        if mode is not None:
            mode.__enter__()

    def _leave(self, module: nn.MultiheadAttention, args: tuple, y: Any) -> None:
        mode = self._attention.pop() if self._attention else None
        if mode is not None:
            mode.__exit__(None, None, None)

    def _projection(
        self,
        module: nn.MultiheadAttention,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
    ) -> None:
        whole: Any = weight if id(weight) in self._by_weight else weight._base
        track = self._by_weight.get(id(whole))
        if track is None or not track.is_measured(self.every) or track.target.gap is not None:
            return
        neurons = slice(None)
        if whole is not weight:
            first = (weight.storage_offset() - whole.storage_offset()) // whole.shape[1]
            neurons = slice(first, first + weight.shape[0])
        if self._wanted(track, module, y):
            use = hooks.linear_use(x, weight, bias, y, neurons)
            self._watch(track, use, y, module.training)

    def _of(self, optimizer: Optimizer) -> list[Track]:
        weights = (p for group in optimizer.param_groups for p in group["params"])
        return [self._by_weight[id(w)] for w in weights if id(w) in self._by_weight]

    def _gradients_made(self, tracks: list[Track], calls: int) -> None:
        """Before the optimizer of these uses them, for the calls-th time in a step."""
        if calls > 1:
            for track in tracks:
                track.sums.problem = "optimizer.step called its closure more than once"
        ending.close(tracks, self.every, self._is_distributed(), update=True)

    def _step_ended(self, tracks: list[Track]) -> None:
        ending.after(tracks)
        if max(track.steps for track in tracks) - self._start == PATIENCE:
            for track in self._tracks:
                if track.steps == self._start:
                    track.wait()
        self._turn_switches()


def check_free(targets: list[Target]) -> None:
    """Raise a ValueError if another Monitor measures one of these."""
    for target in targets:
        for module in target.classes:
            if (other := _monitored.get(module)) is not None and other() is not None:
                raise ValueError(
                    f"model has a Monitor already (on {target.names[0]!r}): remove() it first"
                )


def take_off(handles: list[list[Any]]) -> None:
    """Remove hooks, once."""
    for some in handles:
        while some:
            some.pop().remove()
