"""Random integer-only networks: residual, concatenated, gated, transposed, pooled, with limits and functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lsquant
from lsquant import QuantSpec, Recipe, Rule, UsageError
from lsquant.nn import Add, Cat, Chunk, Clip, Mean, Mul, Slice, Split


class ConvUnit(nn.Module):
    """A convolution, BatchNorm or a bias, and a limit, a function or nothing."""

    def __init__(self, rng: Any, c: int, out: int, kernel: int = 3, stride: int = 1, act: str = "", norm: bool = True):
        super().__init__()
        groups = int(rng.choice([1, 1, c])) if c == out else 1
        self.conv = nn.Conv2d(c, out, kernel, stride, kernel // 2, groups=groups, bias=not norm)
        self.norm = nn.BatchNorm2d(out) if norm else nn.Identity()
        kinds: dict[str, Any] = {
            "relu": nn.ReLU, "relu6": nn.ReLU6, "clip": lambda: Clip(-0.5, 1.25), "silu": nn.SiLU, "gelu": nn.GELU,
            "hardswish": nn.Hardswish, "": nn.Identity,
        }  # fmt: skip
        self.act = kinds[act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, rng: Any, c: int, act: str, last: str):
        super().__init__()
        self.a, self.b, self.add = ConvUnit(rng, c, c, act=act), ConvUnit(rng, c, c), Add()
        self.last = nn.ReLU() if last == "relu" else nn.Identity()
        self.skip = ConvUnit(rng, c, c, kernel=1) if rng.random() < 0.3 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.add(self.b(self.a(x)), self.skip(x)))


class Dense(nn.Module):
    """Concatenates its input, so that steps are tied far back."""

    def __init__(self, rng: Any, c: int, act: str):
        super().__init__()
        self.a, self.cat, self.out = ConvUnit(rng, c, c, act=act), Cat(1), ConvUnit(rng, 2 * c, c, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cat(x, self.a(x)))


class Pyramid(nn.Module):
    """Pools a tensor twice and concatenates all three, as detectors do."""

    def __init__(self, rng: Any, c: int, act: str):
        super().__init__()
        self.pool, self.cat, self.out = nn.MaxPool2d(3, 1, 1), Cat(1), ConvUnit(rng, 3 * c, c, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(x)
        return self.out(self.cat(x, y, self.pool(y)))


class UpDown(nn.Module):
    """Halves the size, doubles it, and adds or concatenates."""

    def __init__(self, rng: Any, c: int, act: str):
        super().__init__()
        self.down, self.up, self.add = ConvUnit(rng, c, c, stride=2, act=act), nn.Upsample(scale_factor=2), Add()
        self.out = ConvUnit(rng, c, c, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.add(self.up(self.down(x)), x))


class Sliced(nn.Module):
    def __init__(self, rng: Any, c: int, act: str):
        super().__init__()
        self.low, self.high = Slice(slice(None), slice(0, c // 2)), Slice(slice(None), slice(c // 2, c))
        self.a, self.cat = ConvUnit(rng, c // 2, c // 2, act=act), Cat(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.cat(self.a(self.low(x)), self.high(x))


class Gated(nn.Module):
    """Squeeze-and-excite: every channel times a number between 0 and 1."""

    def __init__(self, rng: Any, c: int, act: str):
        super().__init__()
        self.pool, self.less = nn.AdaptiveAvgPool2d(1), ConvUnit(rng, c, 3, kernel=1, act=act, norm=False)
        self.more, self.mul = ConvUnit(rng, 3, c, kernel=1, norm=False), Mul()
        self.gate = nn.Hardsigmoid() if rng.random() < 0.5 else nn.Sigmoid()
        self.last = nn.ReLU6() if rng.random() < 0.3 else nn.Identity()
        with torch.no_grad():  # not all values are zero behind a ReLU
            self.less.conv.bias.fill_(0.5)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mul(x, self.gate(self.more(self.less(self.pool(x))))))


class Parts(nn.Module):
    """Cuts channels into parts, as the blocks of detectors do; one part is multiplied by another."""

    def __init__(self, rng: Any, c: int, act: str):
        super().__init__()
        self.cut: nn.Module = Chunk(2) if rng.random() < 0.5 else Split([c // 2, c - c // 2])
        self.a, self.mul, self.cat = ConvUnit(rng, c // 2, c // 2, act=act), Mul(), Cat(1)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.cut(x)
        return self.cat(self.a(low), self.mul(low, high))


class Transposed(nn.Module):
    """Averages windows and goes back to the size by a transposed convolution."""

    def __init__(self, rng: Any, c: int, act: str):
        super().__init__()
        kernel, pad, out = [(2, 0, 0), (3, 1, 1), (4, 1, 0), (5, 2, 1)][int(rng.integers(0, 4))]
        self.pool = nn.AvgPool2d(*[(2,), (3, 2, 1)][int(rng.integers(0, 2))])
        self.up = nn.ConvTranspose2d(c, c, kernel, 2, pad, out, groups=int(rng.choice([1, c])))
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.up(self.pool(x)))


class Net(nn.Module):
    """A stem, blocks, and a classifier or a convolutional head."""

    def __init__(self, rng: Any):
        super().__init__()
        c = int(rng.choice([4, 8, 12]))
        act = lambda: str(rng.choice(["relu", "relu", "relu6", "clip", "silu", "gelu", "hardswish", ""]))  # noqa: E731
        self.stem = ConvUnit(rng, 3, c, act=act(), norm=bool(rng.random() < 0.8))
        blocks: list[nn.Module] = []
        for _ in range(int(rng.integers(1, 4))):
            kind = int(rng.integers(0, 10))
            if kind == 0:
                blocks.append(Residual(rng, c, act(), str(rng.choice(["relu", ""]))))
            elif kind == 1:
                blocks.append(Dense(rng, c, act()))
            elif kind == 2:
                blocks.append(Pyramid(rng, c, act()))
            elif kind == 3:
                blocks.append(UpDown(rng, c, act()))
            elif kind == 4:
                blocks.append(Sliced(rng, c, act()))
            elif kind == 5:
                blocks += [nn.MaxPool2d(2), ConvUnit(rng, c, c, act=act(), norm=False), nn.Upsample(scale_factor=2)]
            elif kind == 6:
                blocks.append(ConvUnit(rng, c, c, act=act()))
            else:
                blocks.append((Gated, Parts, Transposed)[kind - 7](rng, c, act()))
        self.blocks = nn.Sequential(*blocks)
        self.is_head = bool(rng.random() < 0.25)
        self.end = nn.ReLU() if rng.random() < 0.2 else nn.Identity()
        if self.is_head:
            self.head = nn.Conv2d(c, 5, 1)
        else:
            self.pool = nn.AdaptiveAvgPool2d(1) if rng.random() < 0.5 else Mean((2, 3))
            self.flatten = nn.Flatten()
            self.head = nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.end(self.head(x if self.is_head else self.flatten(self.pool(x))))


def drawn(seed: int, target: str = "onnxruntime") -> tuple[lsquant.FusedNetwork, nn.Module, Tensor]:
    """Return (fused network, the model in it, an input) of a random network, calibrated and trained for two steps.

    target: of its recipe.

    Where a tensor of it is all zeros, so that no step can be set, another one is drawn.
    """
    for again in range(10):
        if found := _drawn(seed + 1_000_000 * again, target):
            return found
    raise AssertionError(f"seed {seed}: ten networks that cannot be calibrated")


def _drawn(seed: int, target: str) -> tuple[lsquant.FusedNetwork, nn.Module, Tensor] | None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = Net(rng)
    x = torch.randn(4, 3, 8, 8) * float(rng.choice([0.5, 1.0, 3.0]))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.num_features))
                module.bias.copy_(0.3 * torch.randn(module.num_features))
                if rng.random() < 0.2:
                    module.weight[0] = 0.0
                if rng.random() < 0.1:
                    module.running_var[-1] = 1e-35
    model.train()
    for _ in range(3):
        model(x)
    model.eval()
    low = QuantSpec(int(rng.integers(2, 9)), granularity=str(rng.choice(["tensor", "channel"])))  # type: ignore[arg-type]
    has_ends = rng.random() < 0.7
    inputs, joins = int(rng.integers(2, 9)), int(rng.choice([8, 8, 8, 6, 4]))
    lsq_plus = np.random.default_rng((seed, 1))  # its own, so that nothing else is drawn otherwise
    share = 0.0 if target == "tensorrt" else float(lsq_plus.choice([0.0, 0.0, 1.0, 0.6]))
    first, last, inner, stored = (QuantSpec(b, offset=bool(lsq_plus.random() < share)) for b in (8, 8, inputs, joins))
    ends = [Rule("first", 8, first), Rule("last", 8, last)] if has_ends else []
    recipe = Recipe(low, inner, ends, joins=stored, target=target)  # type: ignore[arg-type]
    lsquant.prepare(model, recipe, example_inputs=x)
    try:
        lsquant.calibrate(model, [x])
    except UsageError as error:
        if "are zero" in str(error):
            return None
        raise
    fused = lsquant.fuse(model).train()
    optimizer = torch.optim.SGD(lsquant.param_groups(fused, lr=0.01, step_lr=1e-4), momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        fused(x).square().mean().backward()
        optimizer.step()
    return fused.eval(), model, x
