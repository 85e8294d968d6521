"""Networks whose forward uses functions, as users write them, and how two networks are compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant


class Residual(nn.Module):
    """In-place addition and ReLU by function, dropout by mode."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.dropout(out, 0.3, self.training)
        out = self.conv2(out)
        out += x
        return torch.relu(out)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv(x))
        scale = self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * scale.sigmoid()


class InvertedResidual(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 8, 1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.project = nn.Conv2d(8, channels, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norms[0](self.expand(x)))
        y = self.norms[1](self.depthwise(y)).clamp(0, 6)
        return x + self.norms[2](self.project(y))


class ConvBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBlock(channels, channels, 3), ConvBlock(channels, channels, 3)
        self.add = True

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Halves, a chain of bottlenecks, all of them concatenated: lists that grow while the forward runs."""

    def __init__(self, channels: int, out_channels: int, n: int = 2) -> None:
        super().__init__()
        half = out_channels // 2
        self.cv1 = ConvBlock(channels, out_channels)
        self.cv2 = ConvBlock((2 + n) * half, out_channels)
        self.m = nn.ModuleList(Bottleneck(half) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBlock(channels, channels // 2), ConvBlock(channels * 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(F.max_pool2d(y[-1], 5, 1, 2) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class Head(nn.Module):
    """Changes the list it is given; another result in training mode."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.box = nn.ModuleList(nn.Conv2d(c, 4, 1) for c in channels)
        self.cls = nn.ModuleList(nn.Conv2d(c, 3, 1) for c in channels)

    def forward(self, xs: list[Tensor]) -> Any:
        for i in range(len(xs)):
            xs[i] = torch.cat((self.box[i](xs[i]), self.cls[i](xs[i])), 1)
        if self.training:
            return xs
        shape = xs[0].shape
        box, cls = torch.cat([x.view(shape[0], 7, -1) for x in xs], 2).split((4, 3), 1)
        return torch.cat((box, cls.sigmoid()), 1)


class Detector(nn.Module):
    """Swish, concatenation, nearest upsampling, pooling as in SPPF, a head with a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c2f = ConvBlock(3, 8, 3, 2), C2f(8, 8)
        self.down, self.sppf = ConvBlock(8, 16, 3, 2), SPPF(16)
        self.up, self.head = C2f(24, 8, 1), Head((8, 16))

    def forward(self, x: Tensor) -> Any:
        p = self.c2f(self.stem(x))
        q = self.sppf(self.down(p))
        u = F.interpolate(q, size=p.shape[2:], mode="nearest")
        return self.head([self.up(torch.cat([u, p], 1)), q])


class Classifier(nn.Module):
    """A block between a stem and a head."""

    def __init__(self, block: type[nn.Module] = Residual, channels: int = 4) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, channels, 3), block(channels), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


def tensors(value: Any) -> list[Tensor]:
    """All tensors in an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for part in parts for t in tensors(part)]


def run(model: nn.Module, x: Any, training: bool) -> dict[str, Tensor]:
    """Outputs; in training mode gradients and buffers too, with the random numbers of one seed."""
    x = copy.deepcopy(x)
    torch.manual_seed(7)
    model.train(training)
    outputs = tensors(model(**x) if isinstance(x, dict) else model(x))
    found = {f"output {i}": t.detach().clone() for i, t in enumerate(outputs)}
    if training:
        model.zero_grad()
        torch.stack([t.square().sum() for t in outputs if t.is_floating_point()]).sum().backward()
        found |= {f"gradient {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
        found |= {f"buffer {k}": b.clone() for k, b in model.named_buffers()}
    found["random"] = torch.rand(3)
    return found


def assert_equal_runs(model: nn.Module, plain: nn.Module, *inputs: Any) -> None:
    """Both compute the same bits: outputs, gradients, buffers, random numbers drawn; in both modes."""
    for x in inputs:
        for training in (False, True):
            one, two = run(model, x, training), run(plain, x, training)
            assert list(one) == list(two)
            for name, tensor in one.items():
                assert torch.equal(tensor, two[name]), f"{name} differs, training={training}"


def traced(model: nn.Module, x: Any, **options: Any) -> tuple[Any, Any, lsquant.Traced]:
    """The model traced, an untraced copy of it, and what trace returned."""
    plain = copy.deepcopy(model)
    return model, plain, lsquant.trace(model, x, **options)
