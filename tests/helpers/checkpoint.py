"""Models with every kind of quantizer, trained a little, to be saved and loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lsquant
from helpers.convert import images, net, ready, state
from lsquant import QuantSpec, Recipe, Rule
from lsquant.nn import quantizers

VARIED = Recipe(
    QuantSpec(4, granularity="channel"), QuantSpec(4, offset=True),
    [Rule("5", QuantSpec(3, granularity="group", group_size=8), QuantSpec(5))],
)  # fmt: skip

RECIPES = {
    "w4a4": Recipe(4, 4),
    "weights": Recipe(QuantSpec(2, narrow=True)),
    "inputs": Recipe(None, 4),
    "varied": VARIED,
}


def trained(recipe: Recipe = VARIED) -> nn.Module:
    """Prepared, calibrated, and moved by a few training steps."""
    model, x = net(), images(8)
    ready(model, recipe, x).train()
    optimizer = torch.optim.SGD(lsquant.param_groups(model, lr=0.1), momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def everything(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = dict(state(model))
    for name, q in quantizers(model):
        found[name] = (q.spec, q.requested, q.is_initialized, q.elements_per_step)
    return {**found, "types": [type(m) for m in model.modules()]}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name
