"""The CIFAR-10 residual networks of He et al. (arXiv:1512.03385, section 4.2) with parameter-free shortcuts."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}  # blocks per stage; depth = 6 n + 2


class Shortcut(nn.Module):
    """Shortcut without parameters (option A): every second pixel, channels of zeros on both sides; or the identity."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, (out_channels - channels) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 1 and not self.added:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, added={self.added}"


class BasicBlock(nn.Module):
    """conv 3x3, BatchNorm, ReLU, conv 3x3, BatchNorm, plus the shortcut, ReLU."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = Shortcut(channels, out_channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(x)  # first: in backward its gradient, never channels last, is then the second term
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class CifarResNet(nn.Module):
    """Classify images: `blocks` blocks in each of three stages of 16, 32 and 64 channels.

    Input: (N, 3, 32, 32) float32. Returns logits (N, classes) float32.
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.pool(x), 1))


def cifar_resnet(name: str) -> CifarResNet:
    """Build resnet20, resnet32, resnet44 or resnet56 with fresh weights."""
    return CifarResNet(DEPTHS[name])
