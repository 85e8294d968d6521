"""The networks that are timed: ResNet-20 of lsquant's own task, and others in the shapes of well-known ones."""

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


def unit(channels: int, out: int, kernel: int, stride: int, act: nn.Module | None, groups: int = 1) -> nn.Sequential:
    """A convolution, BatchNorm, and an activation function or none."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), *([] if act is None else [act]))


class MobileNetV1(nn.Module):
    """The shapes of MobileNetV1, width 1 (arXiv:1704.04861, table 1), with ReLU6.  (N, 3, 224, 224) to (N, 1000)."""

    WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    STRIDED = (2, 4, 6, 12)

    def __init__(self) -> None:
        super().__init__()
        parts = [unit(3, 32, 3, 2, nn.ReLU6())]
        for i, (a, b) in enumerate(pairwise(self.WIDTHS), 1):
            parts += [unit(a, a, 3, 2 if i in self.STRIDED else 1, nn.ReLU6(), a), unit(a, b, 1, 1, nn.ReLU6())]
        self.features = nn.Sequential(*parts)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1024, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.flatten(self.average(self.features(x)), 1))


class Inverted(nn.Module):
    """1x1 to six times the width, depthwise 3x3, 1x1 without activation function, plus the input where shapes allow."""

    def __init__(self, channels: int, out: int, stride: int, times: int) -> None:
        super().__init__()
        wide = channels * times
        first = [unit(channels, wide, 1, 1, nn.ReLU6())] if times > 1 else []
        self.parts = nn.Sequential(*first, unit(wide, wide, 3, stride, nn.ReLU6(), wide), unit(wide, out, 1, 1, None))
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parts(x) if self.adds else self.parts(x)


class MobileNetV2(nn.Module):
    """The shapes of MobileNetV2, width 1 (arXiv:1801.04381, table 2).  (N, 3, 224, 224) to (N, 1000)."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = [unit(3, 32, 3, 2, nn.ReLU6())]
        channels = 32
        for times, out, count, stride in self.STAGES:
            for i in range(count):
                parts.append(Inverted(channels, out, stride if i == 0 else 1, times))
                channels = out
        self.features = nn.Sequential(*parts, unit(320, 1280, 1, 1, nn.ReLU6()))
        self.average = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.flatten(self.average(self.features(x)), 1))


class Stage(nn.Module):
    """A cross-stage-partial block: two 1x1 branches, one through residual pairs of 1x1 and 3x3, concatenated."""

    def __init__(self, channels: int, out: int, count: int, adds: bool = True) -> None:
        super().__init__()
        half = out // 2
        self.left, self.right = unit(channels, half, 1, 1, nn.SiLU()), unit(channels, half, 1, 1, nn.SiLU())
        self.pairs, self.adds = nn.ModuleList(), adds
        for _ in range(count):
            self.pairs.append(nn.Sequential(unit(half, half, 1, 1, nn.SiLU()), unit(half, half, 3, 1, nn.SiLU())))
        self.end = unit(out, out, 1, 1, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x)
        for pair in self.pairs:
            y = y + pair(y) if self.adds else pair(y)
        return self.end(torch.cat([y, self.right(x)], 1))


class Detector(nn.Module):
    """A detector in the shape of the small YOLOs, 1.8 M parameters: SiLU, concatenations, pooling pyramid, two heads.

    The boxes of both heads are decoded in floating point: centres by sigmoid in units of the stride, sizes by exp.
    (N, 3, 320, 320) to (N, 500, 4 + 1 + classes).
    """

    def __init__(self, width: int = 16, classes: int = 80) -> None:
        super().__init__()
        w = width
        silu = nn.SiLU
        self.stem = nn.Sequential(unit(3, w, 3, 2, silu()), unit(w, 2 * w, 3, 2, silu()), Stage(2 * w, 2 * w, 1))
        self.low = nn.Sequential(unit(2 * w, 4 * w, 3, 2, silu()), Stage(4 * w, 4 * w, 2))
        self.mid = nn.Sequential(unit(4 * w, 8 * w, 3, 2, silu()), Stage(8 * w, 8 * w, 2))
        self.high = nn.Sequential(unit(8 * w, 16 * w, 3, 2, silu()), Stage(16 * w, 16 * w, 1))
        self.narrow, self.pool = unit(16 * w, 8 * w, 1, 1, silu()), nn.MaxPool2d(5, 1, 2)
        self.pyramid, self.lateral = unit(32 * w, 16 * w, 1, 1, silu()), unit(16 * w, 8 * w, 1, 1, silu())
        self.up = nn.Upsample(scale_factor=2)
        self.merge, self.down = Stage(16 * w, 8 * w, 1, adds=False), unit(8 * w, 8 * w, 3, 2, silu())
        self.last = Stage(16 * w, 16 * w, 1, adds=False)
        outputs = 4 + 1 + classes
        self.near, self.far = nn.Conv2d(8 * w, outputs, 1), nn.Conv2d(16 * w, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        mid = self.mid(self.low(self.stem(x)))
        y = self.narrow(self.high(mid))
        a = self.pool(y)
        b = self.pool(a)
        lateral = self.lateral(self.pyramid(torch.cat([y, a, b, self.pool(b)], 1)))
        near = self.merge(torch.cat([self.up(lateral), mid], 1))
        far = self.last(torch.cat([self.down(near), lateral], 1))
        return torch.cat([self.decoded(self.near(near), 16.0), self.decoded(self.far(far), 32.0)], 1)

    @staticmethod
    def decoded(x: Tensor, stride: float) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([x[..., :2].sigmoid() * stride, x[..., 2:4].exp() * stride, x[..., 4:].sigmoid()], -1)


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

DEPLOYED = {
    **{name: workload for name, workload in WORKLOADS.items() if workload.images},
    "mobilenetv1": Workload("MobileNetV1", MobileNetV1, (8, 3, 224, 224), (2, 3, 64, 64)),
    "mobilenetv2": Workload("MobileNetV2", MobileNetV2, (8, 3, 224, 224), (2, 3, 64, 64)),
    "detector": Workload("detector, 320 x 320", Detector, (8, 3, 320, 320), (2, 3, 64, 64)),
}
"""The networks whose exported files are timed."""
