"""A small CNN and a small transformer encoder, prepared and trained a little: healthy models for `check`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
from lsquant import Recipe


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.head(self.pool(F.relu(self.conv(x))).flatten(1))


class Encoder(nn.Module):
    """A pre-norm transformer encoder block whose products are all layers, over tied embeddings."""

    def __init__(self, activation: Any = F.gelu) -> None:
        super().__init__()
        self.activation = activation
        self.embed, self.qkv, self.out = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x + self.down(self.activation(self.up(self.norm2(x)))))


def images(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Standardised pixels, and the brightest quarter as the label."""
    found = []
    for _ in range(count):
        label = torch.randint(4, (32,))
        x = torch.randn(32, 1, 8, 8)
        x.view(32, 4, 16)[torch.arange(32), label] += 2.0
        found.append((x, label))
    return found


def tokens(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Random tokens; the label is the token doubled."""
    return [(t := torch.randint(32, (8, 12)), 2 * t % 32) for _ in range(count)]


def trained(model: nn.Module, data: list, preset: str, steps: int = 12) -> tuple[nn.Module, Any]:
    """Float first, then prepared, calibrated and trained with param_groups."""
    _train(model, torch.optim.Adam(model.parameters(), lr=1e-2), data, 30)
    lsquant.prepare(model, Recipe.preset(preset), data[0])
    lsquant.calibrate(model, data)
    optimizer = torch.optim.SGD(lsquant.param_groups(model, 1e-3, 1e-4), momentum=0.9)
    _train(model, optimizer, data, steps)
    return model, optimizer


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list, steps: int) -> None:
    for i in range(steps):
        x, y = data[i % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()


def trained_cnn() -> tuple[nn.Module, Any, list]:
    """A healthy small network at 4 bits, its optimizer and its data."""
    data = images()
    return *trained(Cnn(), data, "w4a4", steps=4), data


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(lsquant.param_groups(model, 0.01, 1e-4), momentum=0.9, **options)


def codes(findings: list[lsquant.Finding]) -> set[tuple[str, str]]:
    return {(f.code, f.where) for f in findings}


def only(found: list[lsquant.Finding], code: str, where: str) -> lsquant.Finding:
    """The one finding of a code, which must be there."""
    (finding,) = [f for f in found if f.code == code]
    assert finding.where == where, [str(f) for f in found]
    return finding
