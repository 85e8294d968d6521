"""Steps, offsets and their initial values are float32 with the same bits, whatever torch's default dtype is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import lsquant
from lsquant import Quantizer, QuantSpec, Recipe

DTYPES = [torch.bfloat16, torch.float16, torch.float64]
RECIPES = {
    "tensor": Recipe(4, 4),
    "channel": Recipe(QuantSpec(4, granularity="channel"), 4),
    "group, LSQ+": Recipe(QuantSpec(4, granularity="group", group_size=4), QuantSpec(4, offset=True)),
    "weights only": Recipe(4, None),
}


@pytest.fixture
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def built(recipe: Recipe) -> tuple[nn.Module, torch.Tensor]:
    """Weights and data that bfloat16 holds."""
    r = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    for parameter in model.parameters():
        parameter.data = torch.randint(-100, 100, parameter.shape, generator=r).to(parameter.dtype) / 128
    x = torch.randint(-100, 100, (6, 8), generator=r).to(torch.get_default_dtype()) / 32
    lsquant.prepare(model, recipe)
    if recipe.activation is not None:
        lsquant.calibrate(model, [x])
    return model, x


@pytest.mark.parametrize("default", DTYPES, indirect=True, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("engine", ["eager", "cpp"])
def test_a_model_is_prepared_trained_and_shipped(recipe: str, default: torch.dtype, engine: str) -> None:
    model, x = built(RECIPES[recipe])
    y = model(x)
    assert y.dtype == default
    y.square().sum().backward()
    for name, parameter in model.named_parameters():
        is_quantizers = "quantizer" in name
        assert parameter.dtype == (torch.float32 if is_quantizers else default), name
        assert parameter.grad.dtype == parameter.dtype
        assert bool(parameter.grad.isfinite().all())
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("initial_step")} == {torch.float32}
    if RECIPES[recipe].activation is not None:
        assert torch.equal(lsquant.to_integer(model.eval())(x), model(x))


@pytest.mark.parametrize("default", DTYPES, indirect=True, ids=str)
@pytest.mark.parametrize("method", ["mse", "paper"])
def test_steps_have_the_bits_that_they_have_under_float32(method: str, default: torch.dtype) -> None:
    """Literal values: 0.25 to 1.75 in quarters; ``2 mean / sqrt(7)`` is no bfloat16, nor is the step found."""
    values = torch.arange(1, 8, dtype=torch.float32) / 4
    quantizer = Quantizer(QuantSpec(4, signed=True), count=7)
    quantizer.initialize(values, method)
    assert quantizer.step.dtype == torch.float32
    if method == "paper":
        assert quantizer.step.item() == pytest.approx(2.0 / 7**0.5, rel=1e-7)
    else:
        assert quantizer.step.item() == pytest.approx(0.25, rel=1e-6)
    third = Quantizer(QuantSpec(4, signed=True), count=7)
    third.initialize(values / 3)
    assert third.step.item() == pytest.approx(0.25 / 3, rel=1e-6)
