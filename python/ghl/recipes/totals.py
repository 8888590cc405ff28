"""Sums over the batches of a pass, over the processes in the end, and where the time went."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ghl.recipes.distributed import World


class Diverged(ValueError):
    """The loss or a weight is no longer finite."""


def check_finite(split: str, loss: float) -> float:
    """The loss itself, if it is finite; else Diverged."""
    if not math.isfinite(loss):
        raise Diverged(f"{split} loss {loss}: expected a finite number")
    return loss


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

    def means(self, split: str, world: World) -> tuple[float, float]:
        """Mean loss and accuracy in percent over all processes; Diverged if not finite."""
        count = torch.tensor(self.count, device=self.loss.device)
        sums = torch.stack([self.loss, self.correct.double(), count.double()])
        total_loss, correct, images = world.total(sums).tolist()
        return check_finite(split, total_loss / images), 100 * correct / images

    def state(self) -> dict[str, Any]:
        """The sums of this process, exactly."""
        return {"loss": self.loss.item(), "correct": self.correct.item(), "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the sums that `state` gave."""
        self.loss.fill_(state["loss"])
        self.correct.fill_(state["correct"])
        self.count = state["count"]


@dataclass
class Pace:
    """Images (of all processes) and seconds of training, and those spent waiting for data."""

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Throughput over all processes."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def waiting(self) -> float:
        """The percentage of the time in which this process stood still for want of data."""
        return 100 * self.waited / self.seconds if self.seconds else 0.0

    def text(self) -> str:
        """The end of a progress line."""
        if not self.images:
            return ""
        return f", {self.images_per_second:.0f} images/s, {self.waiting:.0f} % waiting"

    def state(self) -> dict[str, Any]:
        """The numbers, for a checkpoint."""
        return asdict(self)
