"""A swapped model in a Lightning module: the Trainer's own loop, accumulation and clipping.

Lightning wraps the model before it asks for optimizers, so `synchronize` belongs to there.
"""

from typing import Any

import lightning
import torch
from data import Witness, digits, loss_of, network
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import ghl


class Classifier(lightning.LightningModule):
    """An ordinary module, but for the swap in its constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        ghl.swap(self.network, rule="ghl", tau=1.0)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        images, classes = batch
        return cross_entropy(self.network(images), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = ghl.param_groups(self, lr=0.1, lr_hebb=0.01)
        optimizer = torch.optim.SGD(groups, lr=0.1)
        self.synchronized = ghl.synchronize(self, optimizer)
        self.witness = Witness(self, optimizer)
        return optimizer


def main() -> None:
    """Train, and check that it did something."""
    lightning.seed_everything(0)
    classifier = Classifier()
    first = loss_of(classifier.network)
    trainer = lightning.Trainer(
        max_epochs=5,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(classifier, DataLoader(digits(), 32, shuffle=True))
    classifier.witness.check(first, loss_of(classifier.network))


if __name__ == "__main__":
    main()
