"""One network in training: what it is built from, an epoch, an evaluation, its whole state.

Directories, tables and the order of writing are in `train.py`.
"""

import math
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

import ghl
from ghl.recipes import models
from ghl.recipes.checkpoint import random_states, restore_random_states, seed_everything
from ghl.recipes.config import Config
from ghl.recipes.data import load

# How often a step reads the loss back, which on a GPU waits for the device.
REFRESH = 50


class Diverged(ValueError):
    """The loss is no longer finite."""


class Trainer:
    """Network, optimizer, schedule and data of one run, and the generator that orders the data.

    ValueError or FileNotFoundError when the settings do not fit the data or each other.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = torch.device(config.device)
        wanted = models.architecture(config.arch).channels
        data = load(
            config.data,
            root=config.root,
            channels=wanted,
            size=config.size,
            download=config.download,
            limit_train=config.limit_train,
            limit_test=config.limit_test,
        )
        self.order = torch.Generator().manual_seed(config.seed)
        self.train_loader = self._loader(data.train, self.order)
        self.test_loader = self._loader(data.test, None)

        seed_everything(config.seed)
        self.model = models.build(
            config.arch, data.channels, data.classes, config.size, config.width
        ).to(self.device)
        self.rule = ghl.Rule.preset(config.rule).replace(normalize=config.normalize)
        self.swapped = ghl.swap(self.model, rule=self.rule, tau=config.tau)
        groups = ghl.param_groups(
            self.model,
            lr=config.lr,
            lr_hebb=config.lr_hebb,
            wd=config.wd,
            wd_hebb=config.wd_hebb,
        )
        self.optimizer = torch.optim.SGD(groups, lr=config.lr)
        steps = config.epochs * len(self.train_loader)
        self.schedule = LambdaLR(self.optimizer, Decay(config.schedule, steps))

    def _loader(self, pairs: Any, order: torch.Generator | None) -> DataLoader:
        size = self.config.batch_size
        # Batch normalisation has no variance in a last batch of one example.
        lonely = order is not None and size > 1 and len(pairs) > 1 and len(pairs) % size == 1
        return DataLoader(
            pairs,
            batch_size=size,
            shuffle=order is not None,
            drop_last=lonely,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            generator=order,
        )

    @property
    def lr(self) -> float:
        """The learning rate of everything but the swapped layers at the next step."""
        return self.config.lr * self.schedule.lr_lambdas[0](self.schedule.last_epoch)

    def train_epoch(self, label: str = "") -> tuple[float, float]:
        """One pass over the training set: mean loss and accuracy in percent.

        Diverged as soon as a loss that is looked at is not finite.
        """
        self.model.train()
        totals = Totals(self.device)
        bar = tqdm(self.train_loader, desc=label, leave=False, disable=None, unit="batch")
        for step, (images, classes) in enumerate(bar):
            images = images.to(self.device, non_blocking=True)
            classes = classes.to(self.device, non_blocking=True)
            self.optimizer.zero_grad()
            outputs = self.model(images)
            loss = F.cross_entropy(outputs, classes)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            totals.add(loss.detach(), outputs.detach(), classes)
            if step % REFRESH == 0:
                bar.set_postfix(loss=f"{check_finite('training', loss.item()):.4f}")
        return totals.means("training")

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """One pass over the test set: mean loss and accuracy in percent; changes nothing."""
        self.model.eval()
        totals = Totals(self.device)
        for images, classes in self.test_loader:
            images = images.to(self.device, non_blocking=True)
            classes = classes.to(self.device, non_blocking=True)
            outputs = self.model(images)
            totals.add(F.cross_entropy(outputs, classes), outputs, classes)
        return totals.means("test")

    def rule_fields(self) -> dict[str, Any]:
        """The four choices of the rule, and its temperature as the settings give it."""
        return asdict(self.rule) | {"tau": self.config.tau}

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, as a checkpoint holds it."""
        return {
            "arch": self.config.arch,
            "rule": self.rule_fields(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": random_states(self.order),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; ValueError if it belongs to another network."""
        self.restore_model(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        restore_random_states(state["random"], self.order)

    def restore_model(self, state: dict[str, Any]) -> None:
        """Take over the network of a checkpoint alone; ValueError if it is another one."""
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"checkpoint: expected the weights of {self.config.arch}"
                f" with the settings in config.json ({reason})"
            ) from error


class Decay:
    """The factor on every learning rate after a number of steps: constant, or half a cosine."""

    def __init__(self, name: str, steps: int) -> None:
        self.name = name
        self.steps = steps

    def __call__(self, step: int) -> float:
        if self.name == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(step, self.steps) / self.steps))


class Totals:
    """Running sums over batches, kept on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.count = 0

    def add(self, loss: torch.Tensor, outputs: torch.Tensor, classes: torch.Tensor) -> None:
        """Add a batch: its mean loss, outputs (N, classes) and true classes (N,)."""
        self.loss += loss.double() * len(classes)
        self.correct += (outputs.argmax(dim=1) == classes).sum()
        self.count += len(classes)

    def means(self, split: str) -> tuple[float, float]:
        """Mean loss and accuracy in percent; Diverged if the loss is not finite."""
        loss = check_finite(split, self.loss.item() / self.count)
        return loss, 100 * self.correct.item() / self.count


def check_finite(split: str, loss: float) -> float:
    """The loss itself, if it is finite; else Diverged."""
    if not math.isfinite(loss):
        raise Diverged(f"{split} loss {loss}: expected a finite number")
    return loss
