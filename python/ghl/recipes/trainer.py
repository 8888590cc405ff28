"""One network in training: what it is built from, an epoch, an evaluation, its whole state.

Directories, tables and the order of writing are in `train.py`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import ghl
from ghl.layers import Plastic
from ghl.ranks import local
from ghl.recipes import interrupts, models, optimizers
from ghl.recipes.checkpoint import random_states, restore_random_states, seed_everything
from ghl.recipes.config import LAYERS, Config
from ghl.recipes.data import Data, check_same, load
from ghl.recipes.distributed import World, communicating, compile_called, local_device, spread
from ghl.recipes.ema import Average
from ghl.recipes.loader import Batches, Damage, Order
from ghl.recipes.photographs import decodes
from ghl.recipes.schedule import Decay, image_size
from ghl.recipes.totals import Diverged, Pace, Totals, check_finite

__all__ = ["Diverged", "Trainer"]

# How often a step reads the loss back, which on a GPU waits for the device.
REFRESH = 50
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Network, optimizer, schedule and data of one run, and the generator that orders the data.

    `epoch` epochs and `step` steps of the next are done. In a run of several processes each has a
    Trainer, and all call its methods together. ValueError or FileNotFoundError when the settings
    do not fit the data or each other. `around_step` makes a context for training steps.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.around_step: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.world = World.current()
        self.device = local_device(config.device)
        self.epoch = self.step = 0
        wanted = models.architecture(config.arch).channels
        data = load(
            config.data,
            root=config.root,
            channels=wanted,
            size=config.size,
            download=config.download,
            limit_train=config.limit_train,
            limit_test=config.limit_test,
            seed=config.seed,
        )
        self.data = data.whole
        self.generator = torch.Generator().manual_seed(config.seed)
        self.train_loader = self._batches("training", data.train, self.generator)
        self.test_loader = self._batches("test", data.test, None)
        self.order = self.train_loader.order
        self.decoding = config.decode == "device" or (
            config.decode == "auto" and decodes(self.device)
        )
        seed_everything(config.seed)
        self._build(data)
        if self.world.rank:
            seed_everything(config.seed + self.world.rank * 2**32)
        self.totals, self.pace = Totals(self.device), Pace()

    def _build(self, data: Data) -> None:
        """The network, its rule, and what steps it: `called` is the network where it is trained."""
        config = self.config
        self.model = models.build(
            config.arch, data.channels, data.classes, config.size, config.width
        ).to(self.device)
        if config.resize_from is not None:
            models.check_takes(
                self.model, config.arch, data.channels, config.resize_from, "--resize-from"
            )
        if config.channels_last and not config.fsdp:  # which shards contiguous weights only
            self.model.to(memory_format=torch.channels_last)
        self.rule = ghl.Rule.preset(config.rule).replace(normalize=config.normalize)
        self.swapped = ghl.swap(
            self.model, self.rule, config.tau, LAYERS[config.layers], config.exclude or ()
        )
        self.called = spread(self.model, self.device, fsdp=config.fsdp)
        if config.compile:
            compile_called(self.called)
        groups = ghl.param_groups(
            self.model,
            lr=config.lr,
            lr_hebb=config.lr_hebb,
            wd=config.wd,
            wd_hebb=config.wd_hebb,
        )
        self.optimizer = optimizers.build(
            config.optimizer, groups, config.lr, config.momentum, config.fused
        )
        several = torch.distributed.is_initialized() or config.accumulate > 1
        deferred = config.rule != "bp" and (several or config.amp == "fp16")
        self.synchronized = ghl.synchronize(self.called, self.optimizer) if deferred else None
        steps = self.order.steps
        self.schedule = LambdaLR(
            self.optimizer,
            Decay(config.schedule, config.epochs * steps, config.warmup * steps),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.average = Average(self.model, config.ema) if config.ema else None

    def _batches(self, split: str, pairs: Any, generator: torch.Generator | None) -> Batches:
        config = self.config
        accumulate = config.accumulate if generator else 1
        order = Order(len(pairs), config.batch_size, generator, self.world, accumulate)
        damage = Damage(split, len(pairs), config.damaged_share)
        return Batches(
            pairs,
            order,
            self.device,
            damage,
            workers=config.workers,
            channels_last=config.channels_last,
        )

    @property
    def lr(self) -> float:
        """The learning rate of everything but the swapped layers at the epoch's first step."""
        return self.config.lr * self.schedule.lr_lambdas[0](self.epoch * self.order.steps)

    def train_epoch(
        self, label: str = "", after_step: Callable[[], object] = lambda: None
    ) -> tuple[float, float]:
        """The rest of a pass over the training set: mean loss and accuracy in percent.

        `after_step` is called between steps, where a checkpoint may be taken. Diverged as soon as
        a loss that is looked at is not finite, or a weight in the end.
        """
        self.model.train()
        if self.step == 0:
            self.totals, self.pace = Totals(self.device), Pace()
        self.order.step = self.step
        self._begin(self.train_loader, self._size())
        batches = iter(self.train_loader)
        with self._bar(label) as bar:
            begin = time.perf_counter()
            for step in range(self.step, self.order.steps):
                with self.around_step():
                    loss = self._train_step(batches, self.order.size(step))
                self.step = step + 1
                interrupts.check()
                if step % REFRESH == 0:
                    value = check_finite("training", loss.item())
                    bar.set_postfix_str(f"loss {value:.4f}{self.pace.text()}")
                begin = self._count(begin, self.order.size(step))
                bar.update()
                if self.step < self.order.steps:
                    after_step()
                    begin = time.perf_counter()
            means = self.means()  # waits for the device
            self._count(begin, 0)
        self.train_loader.damage.check(self.world)
        self.epoch, self.step = self.epoch + 1, 0
        return means

    def means(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent of the epoch so far, over all processes.

        Diverged, in all of them, if the loss or a weight of any is not finite.
        """
        means = self.totals.means("training", self.world)
        finite = torch.stack([local(p).isfinite().all() for p in self.model.parameters()])
        if self.world.total((~finite).sum()):
            raise Diverged("weights: expected finite numbers")
        return means

    def _bar(self, label: str) -> tqdm:
        """The progress of an epoch, on the terminal of the first process."""
        disable = None if self.world.main else True
        steps = self.order.steps
        return tqdm(
            total=steps, initial=self.step, desc=label, leave=False, disable=disable, unit="step"
        )

    def _count(self, begin: float, images: int) -> float:
        """Enter what happened since `begin` into the pace; the present time."""
        now = time.perf_counter()
        self.pace.images += images
        self.pace.seconds += now - begin
        self.pace.waited += self.train_loader.waited
        self.train_loader.waited = 0.0
        return now

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]], size: int) -> Tensor:
        """One step on this process's micro-batches of `size` images; the last one's loss."""
        self.optimizer.zero_grad()
        smoothing = self.config.label_smoothing
        options: dict[str, Any] = {"label_smoothing": smoothing} if smoothing else {}
        for left in range(self.order.cut(size) - 1, -1, -1):
            images, classes = next(batches)
            with communicating(self.called, last=left == 0):
                with self._autocast():
                    outputs = self._forward(images, len(classes))
                    loss = F.cross_entropy(outputs, classes, **options)
                # Processes are averaged, micro-batches added: every image must count the same.
                share = len(classes) * self.world.size / size
                self.scaler.scale(loss if share == 1 else loss * share).backward()
            self.totals.add(loss.detach(), outputs.detach(), classes)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update()
        return loss

    def _forward(self, images: Tensor, intact: int) -> Tensor:
        """The network's outputs; ValueError if it cannot be trained on that many intact images."""
        reason, cause = "", None
        try:
            if intact:
                return self.called(images)
        except (ValueError, RuntimeError) as error:  # the latter under torch.compile
            if "more than 1 value per channel" not in str(error):
                raise
            reason, cause = ": batch normalisation has no variance of one value", error
        raise ValueError(
            f"expected more intact images in every micro-batch, found {intact} (more images, a"
            f" larger --batch-size or a smaller --accumulate make them larger){reason}"
        ) from cause

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AMP_DTYPES.get(self.config.amp)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _size(self) -> int:
        """The side of this epoch's training images."""
        config = self.config
        return image_size(self.epoch, config.epochs, config.resize_from or config.size, config.size)

    def _begin(self, batches: Batches, size: int) -> None:
        if batches.photographs is not None:
            batches.photographs.begin(self.epoch, size, encoded=self.decoding)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """One pass over the test set: mean loss and accuracy in percent; changes no parameter.

        Every image counts once, whatever the number of processes. With --ema the averaged
        parameters are evaluated.
        """
        self.world.average_buffers(self.model)
        self.model.eval()
        self._begin(self.test_loader, self.config.size)
        totals = Totals(self.device)
        with self.average.applied() if self.average else nullcontext():
            for step, (images, classes) in enumerate(self.test_loader):
                interrupts.check()
                with self._autocast():
                    outputs = self.model(images)
                if self.test_loader.order.own(step) and len(classes):
                    totals.add(F.cross_entropy(outputs.float(), classes), outputs, classes)
        means = totals.means("test", self.world)
        self.test_loader.damage.check(self.world)
        return means

    def share_of_rule(self) -> str:
        """What the rule trains, as a run tells it."""
        layers = [m for m in self.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        ours = [m for m in layers if isinstance(m, Plastic)]
        own = sum(m.weight.numel() for m in ours)
        numbers = sum(p.numel() for p in self.model.parameters() if p.dim() > 1)
        return f"{len(ours)} of {len(layers)} layers with {own / numbers:.1%} of all weights"

    def rule_fields(self) -> dict[str, Any]:
        """The four choices of the rule, and its temperature as the settings give it."""
        return asdict(self.rule) | {"tau": self.config.tau}

    @property
    def sharded(self) -> bool:
        """Whether the tensors are spread over the processes, and saved apart from the rest."""
        return self.called is self.model and self.config.fsdp and torch.distributed.is_initialized()

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as a checkpoint holds it.

        If `sharded`, without what `tensors` gives.
        """
        self.world.average_buffers(self.model)
        random = random_states(self.generator)
        if self.step:
            random["order"] = self.order.begun
        own = {
            "random": random,
            "totals": self.totals.state(),
            "pace": self.pace.state(),
            "damaged": self.train_loader.damage.found,  # a test set is always read as a whole
        }
        optimizer = self.optimizer.state_dict()
        average = self.average.state() if self.average else None
        if self.sharded:
            optimizer, average = optimizer | {"state": {}}, average and average | {"averages": {}}
        return {
            "arch": self.config.arch,
            "rule": self.rule_fields(),
            "data": self.data,
            "epoch": self.epoch,
            "step": self.step,
            "model": {} if self.sharded else self.model.state_dict(),
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": average,
            "ranks": self.world.gather(own),
        }

    def tensors(self) -> dict[str, Any]:
        """What a sharded checkpoint holds: model, the optimizer's state and averages, by name."""
        held: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": optimizers.state(self.optimizer, self.model),
        }
        if self.average is not None:
            held["average"] = self.average.averages
        return held

    def restore(self, state: dict[str, Any], tensors: dict[str, Any] | None = None) -> None:
        """Continue from a checkpoint; ValueError if it belongs to another network or other data.

        `tensors` are those of a sharded checkpoint. On another number of processes than before,
        generators other than that of the order start anew.
        """
        check_same(self.config.root, state["data"], self.data)
        self.restore_model(state, tensors)
        self.optimizer.load_state_dict(state["optimizer"])
        if tensors is not None:
            optimizers.restore(self.optimizer, self.model, tensors["optimizer"])
        # Not how it falls: on other processes an epoch may have a step more or less.
        own = [None] * len(self.schedule.lr_lambdas)
        self.schedule.load_state_dict(state["schedule"] | {"lr_lambdas": own})
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        ranks = state["ranks"]
        self.pace = Pace(**ranks[0]["pace"])
        if self.world.main:  # in one place: they are counted over all processes
            for rank in ranks:
                self.train_loader.damage.found |= rank["damaged"]
        if len(ranks) == self.world.size:
            restore_random_states(ranks[self.world.rank]["random"], self.generator)
            self.totals.restore(ranks[self.world.rank]["totals"])
            return
        self.generator.set_state(ranks[0]["random"]["order"])
        seed_everything(self.config.seed + self.world.rank * 2**32 + self.schedule.last_epoch)
        if self.world.main:
            sums = [rank["totals"] for rank in ranks]
            self.totals.restore({name: sum(s[name] for s in sums) for name in sums[0]})

    def restore_model(self, state: dict[str, Any], tensors: dict[str, Any] | None = None) -> None:
        """Take over the network of a checkpoint alone; ValueError if it is another one."""
        average = state["average"]
        if tensors is not None:
            state = tensors
            average = average and average | {"averages": tensors["average"]}
        try:
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.restore(average)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"checkpoint: expected the weights of {self.config.arch}"
                f" with the settings in config.json ({reason})"
            ) from error
