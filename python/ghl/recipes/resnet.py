"""The CIFAR residual networks of He et al. (2016), ResNet-20 to ResNet-1202, option A.

ImageNet's residual networks are torchvision's and not here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghl.recipes.hebbnets import init_convolutions, scaled


class Block(nn.Module):
    """Two 3x3 convolutions around a parameter-free shortcut.

    Where the shape changes, the shortcut takes every second pixel and pads channels with zeros.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.missing = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.missing:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.missing))
        return torch.relu(out + shortcut)


class CifarResNet(nn.Module):
    """Depth 6n + 2: one convolution, three stages of n blocks (16, 32, 64 channels), one linear.

    Takes (N, channels, H, W) of any size and gives (N, classes).
    """

    def __init__(self, depth: int, channels: int, classes: int, width: float = 1.0) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth {depth}: expected 6n + 2")
        blocks = (depth - 2) // 6
        c1, c2, c3 = (scaled(c, width) for c in (16, 32, 64))
        self.conv1 = nn.Conv2d(channels, c1, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c1)
        self.stage1 = stage(c1, c1, blocks, stride=1)
        self.stage2 = stage(c1, c2, blocks, stride=2)
        self.stage3 = stage(c2, c3, blocks, stride=2)
        self.classifier = nn.Linear(c3, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` residual blocks, the first of which changes channels and resolution."""
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))
