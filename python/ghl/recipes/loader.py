"""Batches from a data set to the device: their order, who gets which image, what waiting costs.

An epoch's order is that of one process whatever their number: step k takes the k-th `batch_size`
images of one permutation, and every process a part of those.
"""

import time
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ghl.recipes.data import photographs
from ghl.recipes.distributed import World, share
from ghl.recipes.photographs import Damaged, Encoded, Photographs, decode


class Batch(NamedTuple):
    """Images (N, C, H, W) or what they are decoded from, classes (N,), the images left out."""

    images: Any
    classes: Tensor
    damaged: list[Damaged]


class TooManyDamaged(ValueError):
    """More of the images than --damaged-share allows cannot be read."""


class Damage:
    """Counts and names the images that were left out of a split, and says when it is enough.

    TooManyDamaged when they are more than `share` of `images`. `found` has their names by number:
    where the files lie may change when a run is resumed.
    """

    def __init__(self, split: str, images: int, share: float) -> None:
        self.split, self.images, self.share = split, images, share
        self.found: dict[int, str] = {}

    def note(self, images: Sequence[Damaged]) -> None:
        """Report images of this process that were left out; each is named once."""
        for image in images:
            if image.number not in self.found:
                # A file's name may hold bytes that are no text, and cannot be printed as they are.
                name = image.name.encode("utf-8", "backslashreplace").decode()
                print(f"left out, damaged: {name}", flush=True)
                self.found[image.number] = name
        self._check(self.found)

    def check(self, world: World) -> int:
        """The number of damaged images over all processes."""
        return self._check(dict(ChainMap(*world.gather(self.found))))

    def _check(self, found: Mapping[int, str]) -> int:
        if len(found) > self.share * self.images:
            example = next(iter(found.values()))
            raise TooManyDamaged(
                f"--damaged-share {self.share:g}: expected at most that share of the {self.images}"
                f" {self.split} images to be damaged, found {len(found)} ({example})"
            )
        return len(found)


class Order(Sampler[list[int]]):
    """The numbers of the images of each of this process's micro-batches, for one pass.

    In random order if there is a `generator`, whose state at the begin of a pass is kept; `step`
    is the one that the next pass begins with. A last step in which a process would have a single
    image, or none, is left out. ValueError if a micro-batch would be empty.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        generator: torch.Generator | None,
        world: World,
        accumulate: int = 1,
    ) -> None:
        self.images, self.batch_size = images, batch_size
        self.generator, self.world, self.accumulate = generator, world, accumulate
        self.step = 0
        self.begun: Tensor | None = None
        self.steps = -(-images // batch_size)
        if generator is None:
            return
        pieces = world.size * accumulate
        if batch_size < pieces:
            raise ValueError(
                f"--batch-size {batch_size}: expected at least {pieces}, one image for each"
                f" of {world.size} processes times --accumulate {accumulate}"
            )
        # Batch normalisation has no variance in a batch of one example.
        rest = images % batch_size
        if images > rest > 0 and rest < world.size * min(2, batch_size // world.size):
            self.steps -= 1
        elif images < world.size:
            raise ValueError(
                f"--batch-size {batch_size}: expected {world.size} images or more to train on, one"
                f" for each process, found {images}"
            )

    def __len__(self) -> int:
        return (self.steps - 1) * self.accumulate + self.cut(self.size(self.steps - 1))

    def size(self, step: int) -> int:
        """The images of a step, of all processes."""
        return min(self.batch_size, self.images - step * self.batch_size)

    def cut(self, size: int) -> int:
        """How many micro-batches a process has in a step of `size` images: a small step is cut into
        fewer than --accumulate, none larger than those of a full step, if two images are not."""
        wanted = -(-size * self.accumulate // self.batch_size)
        least = min(2, self.batch_size // (self.world.size * self.accumulate))
        return max(1, min(wanted, size // (self.world.size * max(1, least))))

    def own(self, step: int) -> int:
        """How many of them are this process's."""
        return len(share(range(self.size(step)), self.world.rank, self.world.size))

    def __iter__(self) -> Iterator[list[int]]:
        numbers = self._numbers()
        for step in range(self.step, self.steps):
            chunk = numbers[step * self.batch_size : (step + 1) * self.batch_size]
            cut = self.cut(len(chunk))
            for part in range(cut):
                piece = share(chunk, self.world.rank * cut + part, self.world.size * cut)
                # In testing, a sharded network's forward needs all processes, with or without work.
                yield list(piece) or [chunk[0]]

    def _numbers(self) -> Sequence[int]:
        if self.generator is None:
            return range(self.images)
        order = torch.randperm(self.images, generator=self.generator).tolist()
        # PyTorch's RandomSampler, which runs were ordered by, draws a permutation more in the end.
        torch.randperm(self.images, generator=self.generator)
        return order

    def note_begin(self) -> None:
        """Keep the generator's state: a pass that is cut off is drawn again from there."""
        if self.generator is not None:
            self.begun = self.generator.get_state()


def collate(items: list[tuple[Any, int]]) -> Batch:
    """A batch of what the data set gave, without the damaged ones."""
    intact = [(image, label) for image, label in items if not isinstance(image, Damaged)]
    damaged = [image for image, _ in items if isinstance(image, Damaged)]
    images: Any = [image for image, _ in intact]
    if images and not any(isinstance(image, Encoded) for image in images):
        images = torch.stack(images)
    classes = torch.tensor([label for _, label in intact], dtype=torch.int64)
    return Batch(images, classes, damaged)


class Batches:
    """The batches of a pass on the device, copied there beside the work of the step before.

    uint8 images become floats in [-1, 1] on the device. `waited` counts the seconds in which the
    next batch was not there yet. A batch without an intact image is a grey one without a class.
    """

    def __init__(
        self,
        pairs: Any,
        order: Order,
        device: torch.device,
        damage: Damage,
        *,
        workers: int,
        channels_last: bool,
    ) -> None:
        self.order, self.device, self.damage = order, device, damage
        self.photographs = photographs(pairs)
        self.loader = DataLoader(
            pairs,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            generator=order.generator,
        )
        self.format = torch.channels_last if channels_last else torch.preserve_format
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.order.note_begin()
        begin = time.perf_counter()
        for batch in self.loader:
            images, classes = self._arrive(batch)
            self.waited += time.perf_counter() - begin
            yield images, classes
            begin = time.perf_counter()

    def _arrive(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch on the device; on a GPU copied by a stream that compute waits for."""
        if self.copies is None:
            return self._prepare(batch)
        with torch.cuda.stream(self.copies):
            arrived = self._prepare(batch)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self.copies)
        for tensor in arrived:
            tensor.record_stream(compute)
        return arrived

    def _prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.photographs is not None:
            batch = self._decode(batch, self.photographs)
        if batch.damaged:
            self.damage.note(batch.damaged)
        images = batch.images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.to(torch.float32).div_(127.5).sub_(1)
        images = images.to(memory_format=self.format)
        return images, batch.classes.to(self.device, non_blocking=True)

    def _decode(self, batch: Batch, source: Photographs) -> Batch:
        """What was left to the device to decode; photographs of other formats came decoded."""
        if isinstance(batch.images, Tensor):
            return batch
        encoded = [image for image in batch.images if isinstance(image, Encoded)]
        decoded = iter(decode(encoded, self.device) if encoded else [])
        images: list[Tensor] = []
        kept, damaged = [], list(batch.damaged)
        for image, label in zip(batch.images, batch.classes.tolist(), strict=True):
            pixels = next(decoded) if isinstance(image, Encoded) else image.to(self.device)
            if pixels is None:
                damaged.append(Damaged(source.files.name(image.number), image.number))
            else:
                images.append(pixels)
                kept.append(label)
        if not images:
            images = [torch.full((3, source.size, source.size), 128, dtype=torch.uint8)]
        return Batch(torch.stack(images), torch.tensor(kept, dtype=torch.int64), damaged)
