"""A swapped model of timm in the steps of timm's own training script, which its package leaves out.

Model, loader, augmentation, loss, optimizer, scheduler, scaler and EMA are timm's; of ours are the
swap, the call of `synchronize`, and the learning rate of the swapped layers.
"""

from typing import Any

import numpy as np
import timm
import torch
from data import Witness, digits
from PIL import Image
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler, random_seed
from torch.utils.data import Dataset

import ghl

SHAPE = (3, 32, 32)
ACCUMULATE = 2


class Digits(Dataset):
    """The digits as photographs: PIL images, for timm's transforms to enlarge."""

    def __init__(self) -> None:
        self.images, self.classes = digits(256).tensors
        self.transform: Any = None  # create_loader sets it

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        pixels = (self.images[number, 0] * 255).to(torch.uint8).numpy()
        image = Image.fromarray(np.repeat(pixels[..., None], 3, axis=2))
        return self.transform(image), int(self.classes[number])


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """ghl's groups, as timm's scheduler wants them: it scales every group's own learning rate."""
    return ghl.param_groups(model, lr=0.05, lr_hebb=0.01)


def main() -> None:
    """Train, and check that it did something."""
    random_seed(0)
    model = timm.create_model("resnet10t", num_classes=10)
    print(ghl.swap(model, rule="ghl", tau=1.0))
    optimizer = create_optimizer_v2(parameter_groups(model), opt="sgd", lr=0.05, momentum=0.9)
    synchronized = ghl.synchronize(model, optimizer)
    print(synchronized)
    witness = Witness(model, optimizer)
    scaler, ema = NativeScaler(device="cpu"), ModelEmaV3(model, decay=0.9)
    loader = create_loader(
        Digits(), SHAPE, batch_size=32, is_training=True, use_prefetcher=False, num_workers=0,
        no_aug=True, device=torch.device("cpu"),
    )  # fmt: skip
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=4, updates_per_epoch=len(loader) // ACCUMULATE
    )
    mixup, criterion = Mixup(mixup_alpha=0.1, num_classes=10), SoftTargetCrossEntropy()
    meters = []
    for epoch in range(epochs):
        model.train()
        meter = AverageMeter()
        for step, (images, classes) in enumerate(loader):
            images, targets = mixup(images, classes)
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(model(images), targets)
            update = (step + 1) % ACCUMULATE == 0
            scaler(
                loss / ACCUMULATE,
                optimizer,
                clip_grad=1.0,
                parameters=model.parameters(),
                need_update=update,
            )
            meter.update(loss.item(), len(images))
            if update:
                optimizer.zero_grad()
                ema.update(model)
        scheduler.step(epoch + 1, meter.avg)
        meters.append(meter.avg)
    witness.check(meters[0], meters[-1])


if __name__ == "__main__":
    main()
