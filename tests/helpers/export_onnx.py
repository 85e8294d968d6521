"""Small prepared networks to export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lsquant
from lsquant import Recipe


class Small(nn.Module):
    """Convolution, BatchNorm with a negative gamma, residual addition, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 4)
        with torch.no_grad():
            self.bn1.weight[0] = -1.5

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv2(x) + x)
        return self.fc(self.pool(x).flatten(1))


def ready(model: nn.Module, recipe: Recipe, *inputs: Tensor, **kwargs: Any) -> nn.Module:
    """Prepared, and calibrated on its inputs."""
    batch = kwargs or (inputs[0] if len(inputs) == 1 else list(inputs))
    lsquant.prepare(model, recipe)
    lsquant.calibrate(model, [batch], forward=None if len(inputs) < 2 else lambda m, b: m(*b))
    return model


def small(weight: Any = 4, activation: Any = 4, rules: Any = ()) -> tuple[nn.Module, Tensor]:
    x = torch.randn(4, 3, 6, 6)
    return ready(Small(), Recipe(weight, activation, rules=rules), x), x


def tiny(weight: Any = 4, activation: Any = 4) -> tuple[nn.Module, Tensor]:
    """One linear layer: the fastest export."""
    x = torch.randn(4, 6)
    return ready(nn.Sequential(nn.Linear(6, 3)), Recipe(weight, activation), x), x
