"""What changes as training goes on: the factor on the learning rates, the side of the images."""

import math

# Sides of images are multiples of this: each size is another program to choose or compile.
GRAIN = 8
# The share of the epochs over which images grow; the last ones have their full size.
GROWTH = 0.75


class Decay:
    """The factor on every learning rate after a number of steps: constant, or half a cosine.

    Before that it rises linearly over `warmup` steps.
    """

    def __init__(self, name: str, steps: int, warmup: int = 0) -> None:
        self.name = name
        self.steps = steps
        self.warmup = warmup

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.name == "constant":
            return 1.0
        done, steps = step - self.warmup, self.steps - self.warmup
        return 0.5 * (1 + math.cos(math.pi * min(done, steps) / steps))


def image_size(epoch: int, epochs: int, first: int, last: int) -> int:
    """The side of training images in an epoch (from 0): from `first` linearly to `last`."""
    growing = round(GROWTH * (epochs - 1))
    if epoch >= growing:
        return last
    side = first + (last - first) * epoch / growing
    return max(first, int(side) // GRAIN * GRAIN)
