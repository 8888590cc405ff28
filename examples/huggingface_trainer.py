"""A swapped ResNet of transformers under its Trainer, with accumulation and clipping.

The Trainer wraps the model after it made the optimizer; `synchronize` may be called when training
begins, which its callbacks tell.
"""

import tempfile
from typing import Any

import torch
from data import Witness, digits
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import ghl


class Synchronize(TrainerCallback):
    """Calls `ghl.synchronize` once model and optimizer are what will be trained."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        model, optimizer = objects["model"], objects["optimizer"]  # which accelerate has wrapped
        self.synchronized = ghl.synchronize(model, optimizer)
        self.witness = Witness(model, getattr(optimizer, "optimizer", optimizer))


def examples() -> list[dict[str, Any]]:
    """The digits as the Trainer wants them: named, in three channels, enlarged to 32x32."""
    images, classes = digits(256).tensors
    large = nn.functional.interpolate(images, size=32).expand(-1, 3, -1, -1)
    return [
        {"pixel_values": image, "labels": label}
        for image, label in zip(large, classes, strict=True)
    ]


def main() -> None:
    """Train, and check that it did something."""
    set_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
    model = ResNetForImageClassification(config)
    print(ghl.swap(model, rule="ghl", tau=1.0))
    optimizer = torch.optim.SGD(ghl.param_groups(model, lr=0.1, lr_hebb=0.01), lr=0.1)
    synchronize = Synchronize()
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            use_cpu=True,
            num_train_epochs=4,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=examples(),
            callbacks=[synchronize],
            optimizers=(optimizer, None),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    synchronize.witness.check(losses[0], losses[-1])


if __name__ == "__main__":
    main()
