"""The networks that are timed: ResNet-20 of lsquant's own task, and a ResNet-18 and transformer blocks written here."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant.tasks.resnet import cifar_resnet


class Residual(nn.Module):
    """conv 3x3, BatchNorm, ReLU, conv 3x3, BatchNorm, plus the input (through a 1x1 convolution where it changes)."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            conv = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


class ResNet18(nn.Module):
    """The shapes of ResNet-18 (arXiv:1512.03385, table 1).  (N, 3, 224, 224) to (N, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        stages = [nn.Sequential(Residual(a, b, 1 if a == b else 2), Residual(b, b, 1)) for a, b in pairwise(widths)]
        self.stages = nn.Sequential(*stages)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.pool(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(torch.flatten(self.average(x), 1))


class Block(nn.Module):
    """One transformer block: attention and a GELU MLP of four times the width.  (N, tokens, width) to the same.

    norm_first: LayerNorm before each part, as a ViT has it; else after the sum, as BERT has it.
    """

    def __init__(self, width: int, heads: int, norm_first: bool) -> None:
        super().__init__()
        self.heads, self.norm_first = heads, norm_first
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class Workload(NamedTuple):
    """A network and its batch.

    first_last: bits of the first and last layer (None: like all others); images: the input is an image, and labels are
    learned; else the input has a gradient, as inside a network, and the loss is a product with fixed numbers.
    """

    what: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tiny: tuple[int, ...]
    first_last: int | None = 8
    images: bool = True


WORKLOADS = {
    "resnet20": Workload("ResNet-20", lambda: cifar_resnet("resnet20"), (128, 3, 32, 32), (3, 3, 16, 16)),
    "resnet18": Workload("ResNet-18", ResNet18, (8, 3, 224, 224), (2, 3, 64, 64)),
    "vit": Workload(
        "block of ViT-Small", lambda: Block(384, 6, norm_first=True), (8, 197, 384), (2, 5, 384), None, images=False
    ),
    "bert": Workload(
        "block of BERT-base", lambda: Block(768, 12, norm_first=False), (8, 128, 768), (2, 5, 768), None, images=False
    ),
}
