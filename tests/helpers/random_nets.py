"""Random small networks for the tests of exactness: one function of a seed, everything else follows from it."""

from __future__ import annotations

import random

import torch
from torch import nn

import lsquant.nn as lsq_nn
from lsquant._util.errors import UsageError
from lsquant.calibration import calibrate
from lsquant.convert import prepare
from lsquant.recipe import Recipe, Rule
from lsquant.spec import QuantSpec

LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class Block(nn.Module):
    """conv [bn] [+ x] [relu]; the convolution is sometimes a depthwise or a transposed one."""

    def __init__(self, r: random.Random, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.residual = r.random() < 0.4
        groups = r.choice([g for g in (1, 1, 2, 3, channels) if channels % g == 0])
        out = channels if self.residual else groups * r.randint(1, 6)
        kernel = (r.choice([1, 2, 3, 3, 5]), r.choice([1, 2, 3, 3]))
        dilation = r.choice([1, 1, 2])
        kernel = tuple(min(k, (n - 1) // dilation + 1) for k, n in zip(kernel, (height, width), strict=True))
        mode = r.choice(["zeros"] * 5 + ["reflect", "replicate", "circular"])
        same = self.residual or r.random() < 0.3
        if same and dilation == 1:
            kernel = tuple(k - (k + 1) % 2 for k in kernel)  # torch warns about even ones
        padding = "same" if same else (r.randint(0, 2), r.randint(0, 1)) if mode == "zeros" else (r.randint(0, 1), 1)
        stride = 1 if same else (r.choice([1, 1, 2]), r.choice([1, 2]))
        bias = r.random() < 0.6
        if not self.residual and r.random() < 0.25:
            self.conv: nn.Module = transposed(r, channels, out, groups, bias)
        else:
            self.conv = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias, mode)  # type: ignore[arg-type]
        self.bn = random_batchnorm(r, out) if r.random() < 0.6 else nn.Identity()
        self.act = r.choice([nn.ReLU(), nn.ReLU(), nn.Identity(), nn.ReLU6(), nn.LeakyReLU(0.125)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        return self.act(y + x if self.residual else y)


def transposed(r: random.Random, channels: int, out: int, groups: int, bias: bool) -> nn.ConvTranspose2d:
    """Every output has at least one input, and the sizes stay small."""
    stride, dilation = (r.choice([1, 1, 2]), r.choice([1, 2])), r.choice([1, 1, 2])
    kernel = (r.randint(1, 3), r.randint(2, 3))
    padding = tuple(r.randint(0, min(1, dilation * (k - 1) // 2)) for k in kernel)
    extra = tuple(r.randrange(max(s, dilation)) if r.random() < 0.5 else 0 for s in stride)
    return nn.ConvTranspose2d(channels, out, kernel, stride, padding, extra, groups, bias, dilation)  # type: ignore[arg-type]


def random_batchnorm(r: random.Random, channels: int) -> nn.BatchNorm2d:
    """Statistics as after training; gamma of both signs, sometimes 0."""
    bn = nn.BatchNorm2d(channels)
    with torch.no_grad():
        bn.weight.normal_()
        bn.weight[r.randrange(channels)] *= r.choice([0.0, -1.0, 1e-6])
        bn.bias.normal_()
        bn.running_mean.normal_()  # type: ignore[union-attr]
        bn.running_var.uniform_(0.1, 3.0)  # type: ignore[union-attr]
    return bn


class Net(nn.Module):
    """Blocks, a pooling and one or two linear layers, over images or over sequences; sometimes a single layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        r = random.Random(seed)
        torch.manual_seed(seed)
        kind = r.choice(["block", "linear", *["net"] * 8])
        channels, height, width = r.randint(1, 6), r.randint(5, 9), r.randint(5, 9)
        self.shape = (channels, height, width)
        self.blocks, self.pool, self.flat, self.fc, self.head = (
            nn.Sequential(),
            nn.Identity(),
            False,
            nn.Identity(),
            nn.Identity(),
        )
        x = torch.zeros(1, channels, height, width)
        for _ in range({"block": 1, "linear": 0, "net": r.randint(2, 3)}[kind]):
            if min(x.shape[2:]) < 3:
                break
            self.blocks.append(Block(r, *x.shape[1:]).eval())
            x = self.blocks[-1](x)
        if kind == "block":
            return
        if kind == "net" and 1 < min(x.shape[2:]) < 6:
            pools = [nn.AdaptiveAvgPool2d((1, 2)), nn.AvgPool2d(2, 2, 1), nn.MaxPool2d(2, 1), nn.Identity()]
            self.pool = r.choice(pools)
            x = self.pool(x)
        self.flat = r.random() < 0.7
        out = r.randint(1, 9)
        self.fc = nn.Linear(x[0].numel() if self.flat else x.shape[-1], out, bias=r.random() < 0.7)
        if kind == "net" and r.random() < 0.5:
            self.head = nn.Linear(out, r.randint(1, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.blocks(x))
        return self.head(self.fc(x.flatten(1) if self.flat else x))


def random_spec(r: random.Random, layer: nn.Module) -> QuantSpec:
    """Of a weight."""
    kinds = ["tensor", "channel"]
    inputs = layer.in_features if isinstance(layer, nn.Linear) else 0
    sizes = [d for d in (1, 2, 3, 4, 5, 8, 16, 32) if inputs and inputs % d == 0 and inputs / d <= 12]
    if len(sizes) > 1:
        kinds.append("group")
    kind = r.choice(kinds)
    return QuantSpec(
        r.randint(2, 8),
        narrow=r.random() < 0.2,
        granularity=kind,  # type: ignore[arg-type]
        group_size=r.choice(sizes[1:]) if kind == "group" else None,
    )


def random_activation(r: random.Random) -> QuantSpec:
    kind = r.choice(["free", "free", "signed", "narrow", "offset", "signed offset"])
    return QuantSpec(
        r.randint(2, 8),
        signed=True if kind in ("signed", "signed offset") else None,
        narrow=kind == "narrow",
        offset="offset" in kind,
    )


def random_input(seed: int, shape: tuple[int, ...], batch: int, step: float | None = None) -> torch.Tensor:
    """Normal values with outliers, zeros and, given a step, exact ties of its rounding."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, *shape), generator=g) * 2
    x[torch.rand(x.shape, generator=g) < 0.02] *= 100
    x[torch.rand(x.shape, generator=g) < 0.05] = 0.0
    if step is not None:
        ties = (torch.randint(-300, 300, x.shape, generator=g) + 0.5) * step
        x = torch.where(torch.rand(x.shape, generator=g) < 0.2, ties, x)
    return x


def trained_net(seed: int) -> Net:
    """A quantized network with steps as after some training: calibrated, then moved away."""
    r = random.Random(seed + 1_000_000)
    net = Net(seed)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, LAYERS)}
    rules = [Rule(name, random_spec(r, layer), random_activation(r)) for name, layer in layers.items()]
    x = random_input(seed, net.shape, 8)
    prepare(net, Recipe(rules=rules), x)
    try:
        calibrate(net, [x], method="paper")
    except UsageError as error:
        if "are zero" not in str(error):
            raise
        for block in net.blocks:  # a ReLU left nothing over
            block.act = nn.LeakyReLU(0.125)  # type: ignore[union-attr]
        calibrate(net, [x], method="paper")
    with torch.no_grad():
        for _, quantizer in lsq_nn.quantizers(net):
            quantizer.step.mul_(0.4 + 1.2 * torch.rand_like(quantizer.step))
            if r.random() < 0.1:
                quantizer.step[0] = -1.0  # below the guard
    return net.eval()


class Side(nn.Module):
    """Several networks side by side, an input and an output each, to be exported as one graph."""

    def __init__(self, nets: list[Net]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [net(x) for net, x in zip(self.nets, inputs, strict=True)]

    def example(self, seed: int, batch: int) -> list[torch.Tensor]:
        """Inputs that hit ties of the first layer's rounding."""
        return [random_input(seed + 7 * i, net.shape, batch, first_step(net)) for i, net in enumerate(self.nets)]  # type: ignore[arg-type]


def first_step(net: nn.Module) -> float:
    _, layer = next(lsq_nn.quantized_layers(net))
    assert layer.input_quantizer is not None
    return float(layer.input_quantizer.step.detach()[0])
