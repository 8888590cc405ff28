"""DeepHebb and FastHebb in the architecture of the authors of GHL (arXiv 2601.21367).

Ordinary modules without any learning rule: `ghl.swap` gives the convolutions theirs. The forms for
ImageNet are not published: here, what SoftHebb's authors publish for it, and an average.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scaled(channels: int, width: float) -> int:
    """The number of channels at a width multiplier; at least one."""
    return max(1, round(channels * width))


def init_convolutions(model: nn.Module) -> None:
    """Draw every convolution's weight from the Kaiming normal distribution with its fan-in."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")


class DeepHebb(nn.Module):
    """Three convolutions (96, 384, 1536 channels) and a linear classifier.

    Takes (N, channels, size, size) with size of at least 8 and gives (N, classes).
    """

    def __init__(self, channels: int, classes: int, size: int, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3 = (scaled(c, width) for c in (96, 384, 1536))
        self.bn1 = nn.BatchNorm2d(channels, affine=False)
        self.conv1 = nn.Conv2d(channels, c1, 5, padding=2, bias=False)
        self.pool1 = nn.MaxPool2d(4, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(c1, affine=False)
        self.conv2 = nn.Conv2d(c1, c2, 3, padding=1, bias=False)
        self.pool2 = nn.MaxPool2d(4, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(c2, affine=False)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1, bias=False)
        self.pool3 = nn.AvgPool2d(2)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(c3 * (size // 8) ** 2, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(torch.relu(self.conv1(self.bn1(x))))
        x = self.pool2(torch.relu(self.conv2(self.bn2(x))))
        x = self.pool3(torch.relu(self.conv3(self.bn3(x))))
        return self.classifier(self.dropout(x.flatten(1)))


class FastHebb(nn.Module):
    """Four unpadded convolutions (96, 128, 192, 256 channels) and two linear layers.

    Takes (N, channels, size, size) with size of at least 24 and gives (N, classes).
    """

    def __init__(self, channels: int, classes: int, size: int, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3, c4, hidden = (scaled(c, width) for c in (96, 128, 192, 256, 4096))
        side = ((size - 4) // 2 - 4) // 2 - 2
        self.conv1 = nn.Conv2d(channels, c1, 5, bias=False)
        self.pool1 = nn.MaxPool2d(2)
        self.bn1 = nn.BatchNorm2d(c1, affine=False)
        self.conv2 = nn.Conv2d(c1, c2, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(c2, affine=False)
        self.conv3 = nn.Conv2d(c2, c3, 3, bias=False)
        self.pool3 = nn.MaxPool2d(2)
        self.bn3 = nn.BatchNorm2d(c3, affine=False)
        self.conv4 = nn.Conv2d(c3, c4, 3, bias=False)
        self.bn4 = nn.BatchNorm2d(c4, affine=False)
        self.fc5 = nn.Linear(c4 * side**2, hidden)
        self.bn5 = nn.BatchNorm1d(hidden)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(hidden, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.bn5(torch.relu(self.fc5(x.flatten(1))))
        return self.classifier(self.dropout(x))

    def features(self, x: Tensor) -> Tensor:
        """What the convolutions make of the images: (N, channels, side, side)."""
        x = self.bn1(self.pool1(torch.relu(self.conv1(x))))
        x = self.bn2(torch.relu(self.conv2(x)))
        x = self.bn3(self.pool3(torch.relu(self.conv3(x))))
        return self.bn4(torch.relu(self.conv4(x)))


class DeepHebbImageNet(nn.Module):
    """SoftHebb's four convolutions for ImageNet (48, 192, 768, 3072 channels), a linear classifier.

    Takes (N, channels, size, size) of any size from 64 and gives (N, classes): the last map is
    averaged to the 4x4 of the CIFAR form, because all of it would ask for 600 million weights.
    """

    def __init__(self, channels: int, classes: int, size: int, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3, c4 = (scaled(c, width) for c in (48, 192, 768, 3072))
        self.bn1 = nn.BatchNorm2d(channels, affine=False)
        self.conv1 = nn.Conv2d(channels, c1, 7, padding=3, bias=False)
        self.bn2 = nn.BatchNorm2d(c1, affine=False)
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=2, bias=False)
        self.bn3 = nn.BatchNorm2d(c2, affine=False)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(c3, affine=False)
        self.conv4 = nn.Conv2d(c3, c4, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(4, stride=2, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(c4 * 4 * 4, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv1(self.bn1(x))))
        x = self.pool(torch.relu(self.conv2(self.bn2(x))))
        x = self.pool(torch.relu(self.conv3(self.bn3(x))))
        x = self.pool(torch.relu(self.conv4(self.bn4(x))))
        return self.classifier(self.dropout(F.adaptive_avg_pool2d(x, 4).flatten(1)))


class FastHebbImageNet(FastHebb):
    """FastHebb with its last map averaged to the 3x3 of the CIFAR form.

    Takes (N, channels, size, size) of any size from 64 and gives (N, classes).
    """

    def __init__(self, channels: int, classes: int, size: int, width: float = 1.0) -> None:
        super().__init__(channels, classes, 32, width)

    def features(self, x: Tensor) -> Tensor:
        """(N, channels, 3, 3)."""
        return F.adaptive_avg_pool2d(super().features(x), 3)
