"""g of prepared layers: counted per sample as the design says, literal numbers, the same for any batch."""

import math

import pytest
import torch
from torch import nn

import lsquant
from lsquant import Recipe
from lsquant.nn import quantizers


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4 * 3, 5),
    )


def quantizer(model: nn.Module, name: str) -> lsquant.Quantizer:
    return dict(quantizers(model))[name]


def images(batch: int) -> torch.Tensor:
    return torch.randn(4, 3, 10, 8, generator=torch.Generator().manual_seed(1)).repeat(batch // 4, 1, 1, 1)


def prepared(preset: str, batch: int) -> nn.Sequential:
    model = net()
    lsquant.prepare(model, Recipe.preset(preset, first_last=None))
    lsquant.calibrate(model, [images(batch)])
    return model


# N by hand: features of one sample (Conv: channels times height times width; Linear: the last dimension)
FEATURES = {"0": 3 * 10 * 8, "2": 8 * 10 * 8, "5": 72}
WEIGHTS = {"0": 8 * 3 * 9, "2": 6 * 4 * 9, "5": 72 * 5}


@pytest.mark.parametrize("batch", [4, 8, 64])
def test_layers_count_the_features_of_one_sample(batch: int) -> None:
    model = prepared("w4a4", batch)
    for name, count in FEATURES.items():
        mine, weight = quantizer(model, f"{name}.input_quantizer"), quantizer(model, f"{name}.weight_quantizer")
        q_max = 7 if name == "0" else 15  # only the images have negative values
        assert mine.q_max == q_max
        assert mine.gradient_scale == pytest.approx(1 / math.sqrt(count * q_max), rel=1e-6)
        assert int(mine.count) == count
        assert weight.gradient_scale == pytest.approx(1 / math.sqrt(WEIGHTS[name] * 7), rel=1e-6)


def test_literal_numbers() -> None:
    model = prepared("w4a4", 4)
    assert quantizer(model, "2.input_quantizer").gradient_scale == pytest.approx(0.010206207261596576, rel=1e-6)
    assert quantizer(model, "5.weight_quantizer").gradient_scale == pytest.approx(0.019920476822239894, rel=1e-6)


def test_the_sequence_is_not_counted() -> None:
    for length in (3, 50):
        model = nn.Sequential(nn.Linear(16, 4))
        lsquant.prepare(model, Recipe.preset("w4a4", first_last=None))
        lsquant.calibrate(model, [torch.randn(2, length, 16)])
        assert int(quantizer(model, "0.input_quantizer").count) == 16


def test_per_channel_weights_count_one_channel() -> None:
    model = net()
    weight = lsquant.QuantSpec(4, signed=True, granularity="channel")
    lsquant.prepare(model, Recipe(weight=weight, activation=None))
    for name, count in {"0": 27, "2": 36, "5": 72}.items():
        mine = quantizer(model, f"{name}.weight_quantizer")
        assert mine.gradient_scale == pytest.approx(1 / math.sqrt(count * 7), rel=1e-6)


def test_weights_in_groups_count_one_group() -> None:
    model = nn.Sequential(nn.Linear(24, 4))
    weight = lsquant.QuantSpec(4, signed=True, granularity="group", group_size=8)
    lsquant.prepare(model, Recipe(weight=weight, activation=None))
    mine = quantizer(model, "0.weight_quantizer")
    assert mine.step.shape == (12,)
    assert mine.gradient_scale == pytest.approx(0.1336306209562122, rel=1e-6)  # 1/sqrt(56)


def test_a_repeated_batch_moves_every_step_equally() -> None:
    """The mean loss over a repeated batch has the same gradients, after calibration on either."""
    grads = []
    for calibration, batch in ((4, 4), (4, 32), (32, 32)):
        model = prepared("w4a4", calibration)
        (model(images(batch)) ** 2).sum(1).mean().backward()
        steps = {n: p.grad for n, p in model.named_parameters() if n.endswith("quantizer.step")}
        grads.append({n: grad.item() for n, grad in steps.items() if grad is not None})
    assert len(grads[0]) == 6
    assert all(abs(g) > 1e-5 for g in grads[0].values())
    for other in grads[1:]:
        assert other == {name: pytest.approx(g, rel=1e-2) for name, g in grads[0].items()}


def test_the_count_is_frozen_by_the_first_batch() -> None:
    """Another image size later does not change it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    lsquant.prepare(model, Recipe.preset("w4a4", first_last=None))
    lsquant.calibrate(model, [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 16, 16)])
    model(torch.randn(1, 3, 20, 20)).sum().backward()
    assert int(quantizer(model, "0.input_quantizer").count) == 3 * 8 * 8
