"""Small networks to prepare, the same twice, and their states compared."""

from __future__ import annotations

import torch
from torch import nn

import lsquant
from lsquant import Recipe
from lsquant.nn import quantized_layers

W4A4 = Recipe(4, 4)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 2, 4, 4)


def ready(model: nn.Module, recipe: Recipe, batch: torch.Tensor) -> nn.Module:
    lsquant.prepare(model, recipe)
    lsquant.calibrate(model, [batch])
    return model


class Backwards(nn.Module):
    """Executed in another order than it is defined."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.stem = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.stem(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], before[name]) for name in before)


def bits(model: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    return {
        name: tuple(q and q.spec.bits for q in (layer.weight_quantizer, layer.input_quantizer))  # type: ignore[misc]
        for name, layer in quantized_layers(model)
    }
