"""What the examples train on, in seconds on a CPU: digits, a small network, and what to check."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import ghl


def digits(images: int = 512) -> TensorDataset:
    """scikit-learn's 8x8 digits: (image (1, 8, 8) in [0, 1], class)."""
    data = load_digits()
    pixels = torch.tensor(data.images[:images, None] / 16, dtype=torch.float32)
    return TensorDataset(pixels, torch.tensor(data.target[:images]))


def network() -> nn.Sequential:
    """Two convolutions and a linear classifier; torch.nn's, nothing of ours yet."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


class Witness:
    """Sees what an optimizer is given, and asks in the end whether training did something.

    An update of rule `ghl` with the default normalisation reaches 1 in every layer, and no further,
    which an ordinary gradient does not. Where that is 0 (behind a residual branch that begins with
    a factor of 0), so is the update.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        layers = [m for m in model.modules() if isinstance(m, (ghl.Conv2d, ghl.Linear))]
        assert layers, "no layer was swapped"
        self.weights = [layer.weight for layer in layers]
        self.begin = [weight.detach().clone() for weight in self.weights]
        self.largest: list[float] = []
        # After the step, because a closure makes gradients within it; they are still there then.
        optimizer.register_step_post_hook(self.look)

    def look(self, *args: object) -> None:
        """The largest number in every swapped layer's gradient."""
        for weight in self.weights:
            assert weight.grad is not None
            self.largest.append(weight.grad.abs().max().item())

    def check(self, first_loss: float, last_loss: float) -> None:
        """Steps were taken on updates, the weights moved, the loss fell."""
        assert self.largest, "no step was taken"
        assert all(n == 0 or abs(n - 1) < 1e-3 for n in self.largest), self.largest
        assert sum(n > 0 for n in self.largest) > 0.8 * len(self.largest)
        for begin, weight in zip(self.begin, self.weights, strict=True):
            assert not torch.equal(begin, weight.detach().cpu())
        assert last_loss < 0.8 * first_loss, (first_loss, last_loss)
        print(f"{len(self.largest)} updates, loss {first_loss:.2f} -> {last_loss:.2f}")


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    """The mean cross-entropy of a network of this module's on the digits."""
    images, classes = digits().tensors
    model.eval()
    loss = nn.functional.cross_entropy(model(images), classes).item()
    model.train()
    return loss
