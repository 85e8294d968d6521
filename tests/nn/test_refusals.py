"""What a layer refuses: weights that steps do not fit, inputs that PyTorch's layer refuses too; the layer is named."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from lsquant import LsquantError, QuantSpec, Recipe
from lsquant._util.errors import ShapeError

CHANNEL = QuantSpec(4, signed=True, granularity="channel")
GROUP = QuantSpec(4, signed=True, granularity="group", group_size=4)
# kind of layer -> the layer, an input, the recipe, the dimension of its output channels
GROWN: dict[str, Any] = {
    "linear": (lambda: nn.Linear(4, 8), (5, 4), Recipe(CHANNEL, 4), 0),
    "linear in groups": (lambda: nn.Linear(4, 8), (5, 4), Recipe(GROUP, 4), 0),
    "conv": (lambda: nn.Conv2d(4, 8, 3), (2, 4, 6, 6), Recipe(CHANNEL, 4), 0),
    "conv in groups": (lambda: nn.Conv2d(4, 8, 3), (2, 4, 6, 6), Recipe(GROUP, 4), 0),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), (2, 4, 6), Recipe(CHANNEL, 4), 0),
    "transposed": (lambda: nn.ConvTranspose2d(4, 8, 3), (2, 4, 6, 6), Recipe(CHANNEL, 4), 1),
    "weights only": (lambda: nn.Linear(4, 8), (5, 4), Recipe(CHANNEL, None), 0),
    "embedding": (lambda: nn.Embedding(8, 4), None, Recipe(CHANNEL, None), 0),
}
ENGINES = ["eager", "cpp"]


def built(kind: str) -> tuple[Any, torch.Tensor]:
    make, shape, recipe, _ = GROWN[kind]
    model = nn.Sequential(OrderedDict(body=make()))
    model.body.bias = None
    x = torch.arange(3) if shape is None else torch.randn(shape)
    lsquant.prepare(model, recipe)
    if recipe.activation is not None:
        lsquant.calibrate(model, [x])
    return model, x


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", GROWN)
@pytest.mark.parametrize("change", ["pruned", "grown"])
def test_a_weight_of_another_size_is_refused_by_name(kind: str, change: str, engine: str) -> None:
    model, x = built(kind)
    layer: Any = model.body
    layer(x)
    dim, weight = GROWN[kind][3], layer.weight.detach()
    layer.weight = nn.Parameter(weight.narrow(dim, 0, 6) if change == "pruned" else torch.cat([weight] * 3, dim))
    with pytest.raises(LsquantError, match=r"layer 'body'.*needs \d+ steps.*has \d+\..*lsquant.prepare") as caught:
        layer(x)
    print(caught.value)
    with pytest.raises(LsquantError, match=r"layer 'body'.*needs \d+ steps"):
        lsquant.integer_weights(model)


def test_the_remedy_works() -> None:
    model, x = built("linear")
    layer: Any = model.body
    layer.weight = nn.Parameter(layer.weight.detach()[:6])
    lsquant.prepare(model, GROWN["linear"][2])
    lsquant.calibrate(model, [x], again=True)
    assert layer(x).shape == (5, 6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "layer", [nn.Conv1d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv3d(3, 8, 3)], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("size", [0, 1, 2])
def test_an_input_smaller_than_the_kernel_is_pytorchs_error(size: int, layer: nn.Module, engine: str) -> None:
    dims = layer.weight.dim() - 2
    layer = type(layer)(3, 8, 3)
    x = torch.randn(2, 3, *[size] * dims)
    with pytest.raises(RuntimeError) as wanted:
        layer(x)
    model = nn.Sequential(layer)
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.calibrate(model, [torch.randn(2, 3, *[5] * dims)])
    with pytest.raises(ShapeError) as found:
        model(x)
    assert isinstance(found.value, LsquantError)
    assert isinstance(found.value, RuntimeError)
    assert str(found.value) == f"layer '0': {wanted.value}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d", "transposed"])
def test_an_empty_batch_is_an_empty_output_and_trains(kind: str, engine: str) -> None:
    model, x = built(kind)
    make, _, _, _ = GROWN[kind]
    empty = x[:0].clone().requires_grad_()
    y = model(empty)
    assert y.shape == make()(x[:0]).shape
    y.sum().backward()
    assert empty.grad.shape == empty.shape
    assert not model.body.weight.grad.any()


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_with_unsigned_codes_of_8_bits(engine: str) -> None:
    """Their codes are no int8: 200 * 3 levels of input."""
    layer: Any = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    model = nn.Sequential(layer)
    lsquant.prepare(model, Recipe(QuantSpec(8, signed=False), QuantSpec(4, signed=False)))
    lsquant.calibrate(model, [torch.full((2, 2), 1.5)])
    with torch.no_grad():
        for quantizer, step in ((layer.weight_quantizer, 0.01), (layer.input_quantizer, 0.5)):
            quantizer.step.fill_(step)
            quantizer.initial_step.fill_(step)
    x = torch.full((1, 2), 1.5)
    assert model(x).item() == pytest.approx(200 * 3 * 2 * 0.005)
