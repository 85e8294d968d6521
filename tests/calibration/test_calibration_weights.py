"""The first steps of weights: set by ``prepare``, later by ``calibrate``, or anew by a rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
import oracle
from lsquant import QuantSpec, Recipe
from lsquant._util.errors import UsageError
from lsquant.nn import quantized_layers

W4A4 = Recipe(4, 4)


def test_weight_steps_are_set_by_prepare_and_an_all_zero_channel_gets_the_median():
    layer = nn.Linear(8, 5)
    with torch.no_grad():
        layer.weight[2] = 0.0
    lsquant.prepare(layer, Recipe(QuantSpec(4, granularity="channel"), 8))
    q = layer.weight_quantizer
    want = oracle.initial_step(layer.weight.detach().numpy(), 7, axis=0)
    others = sorted(float(s) for k, s in enumerate(want) if k != 2)
    assert q.step[2].item() == pytest.approx(others[1], rel=1e-6)
    assert q.step[3].item() == pytest.approx(want[3], rel=1e-6)
    assert q.filled_steps == 1


def test_weights_loaded_later_are_set_by_calibrate():
    layer = nn.Linear(4, 2)
    nn.init.zeros_(layer.weight)
    lsquant.prepare(layer, W4A4)
    assert not layer.weight_quantizer.is_initialized
    with torch.no_grad():
        layer.weight.fill_(0.5)
    lsquant.calibrate(layer, [torch.ones(1, 4)])
    assert layer.weight_quantizer.step.item() == pytest.approx(1.0 / 7**0.5, rel=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 8])
def test_weight_steps_by_least_squared_error(granularity: str, bits: int) -> None:
    """Against a grid of 2,000 steps with every weight rounded; without a rule they stay prepare's."""
    model = nn.Sequential(nn.Linear(40, 3), nn.ReLU(), nn.Linear(3, 30))
    lsquant.prepare(model, Recipe(QuantSpec(bits, granularity=granularity), 4, preset_rules=()))
    layers = [layer for _, layer in quantized_layers(model)]
    paper = [layer.weight_quantizer.step.detach().clone() for layer in layers]
    lsquant.calibrate(model, [torch.randn(8, 40)])
    assert all(torch.equal(a, layer.weight_quantizer.step) for a, layer in zip(paper, layers, strict=True))
    lsquant.calibrate(model, [torch.randn(8, 40)], weights="mse")
    top = 2 ** (bits - 1)

    def error(row: np.ndarray, steps: np.ndarray) -> np.ndarray:
        codes = np.clip(np.rint(row / steps[:, None]), -top, top - 1)
        return np.square(row - codes * steps[:, None]).sum(1)

    for layer, before in zip(layers, paper, strict=True):
        weight = layer.weight.detach().double().numpy()
        rows = weight.reshape(1, -1) if granularity == "tensor" else weight
        found = layer.weight_quantizer.step.detach().double().numpy()
        for row, step, old in zip(rows, found, before.double().numpy(), strict=True):
            best = error(row, np.abs(row).max() * np.geomspace(1e-4, 2.0, 2000)).min()
            mine, papers = error(row, np.array([step, old]))
            assert mine <= 1.0001 * best
            assert bits == 2 or mine < papers / 2
    lsquant.calibrate(model, [torch.randn(8, 40)], weights="paper")
    assert all(torch.equal(a, layer.weight_quantizer.step) for a, layer in zip(paper, layers, strict=True))
    with pytest.raises(UsageError, match="weights='max'; use 'mse' or 'paper'"):
        lsquant.calibrate(model, [torch.randn(8, 40)], weights="max")  # type: ignore[arg-type]
