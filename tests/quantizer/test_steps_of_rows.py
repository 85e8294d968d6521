"""Steps of least squared error of many rows at once, weighted or not; steps rounded to the type of a file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
import oracle
from lsquant import Quantizer, QuantSpec, Recipe, UsageError
from lsquant.mse_rows import row_steps

BOUNDS = [(-2, 1), (-1, 1), (-4, 3), (-8, 7), (-128, 127), (0, 15)]


def rows_of(seed: int, count: int, size: int, low: int) -> torch.Tensor:
    """Rows of different scales, some with many values near 0; not negative where codes are not."""
    torch.manual_seed(seed)
    rows = torch.randn(count, size) * torch.rand(count, 1).exp()
    rows[::5] = torch.rand(len(rows[::5]), size).pow(4) * torch.randn(len(rows[::5]), size).sign()
    return rows.abs() if low == 0 else rows


def weighted_error(v: np.ndarray, m: np.ndarray, steps: np.ndarray, low: int, high: int) -> np.ndarray:
    q = np.clip(np.rint(v / steps[:, None]), low, high)
    return (m * np.square(v - q * steps[:, None])).sum(1)


def excess(v: np.ndarray, m: np.ndarray, step: float, low: int, high: int) -> float:
    """The error of a step over that of the best of 2,000 log-spaced ones, by brute force in float64."""
    grid = np.abs(v).max() * np.geomspace(1e-4, 2, 2000)
    return weighted_error(v, m, np.array([step]), low, high)[0] / weighted_error(v, m, grid, low, high).min()


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_errors_are_those_of_the_best_of_many_steps(bounds: tuple[int, int], size: int) -> None:
    """1,000 rows in all."""
    rows = rows_of(0, 84, size, bounds[0])
    steps, ones = row_steps(rows, *bounds).tolist(), np.ones(size)
    for v, step in zip(rows.double().numpy(), steps, strict=True):
        assert excess(v, ones, step, *bounds) <= 1.001


@pytest.mark.parametrize("bounds", BOUNDS)
def test_errors_with_importance(bounds: tuple[int, int]) -> None:
    rows = rows_of(1, 40, 32, bounds[0])
    importance = torch.rand(40, 32).pow(6)
    importance[:, 0] = 0
    steps = row_steps(rows, *bounds, importance)
    for v, m, step in zip(rows.double().numpy(), importance.double().numpy(), steps.tolist(), strict=True):
        assert excess(v, m, step, *bounds) <= 1.01


def test_rows_without_values_and_rows_that_a_step_represents() -> None:
    exact = torch.tensor([-8.0, 3.0, 7.0, 0.0]) * np.float32(0.0123)
    rows = torch.stack([torch.zeros(4), exact, -exact.abs()])
    steps = row_steps(rows, -8, 7)
    assert steps[0] == 0
    assert torch.equal(torch.round(exact / steps[1]) * steps[1], exact)
    assert row_steps(rows, 0, 7)[2] == 0  # negative values and no code for them
    assert not row_steps(rows[1:2], -8, 7, torch.zeros(1, 4)).any()
    assert row_steps(torch.empty(0, 4), -8, 7).shape == (0,)


# ---- where they are used ----


@pytest.mark.parametrize("preset", ["w4", "w3g8", "w4g8a8"])
def test_weights_beside_float_inputs_and_in_groups_begin_with_least_squares(preset: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 16), nn.Embedding(5, 16))
    lsquant.prepare(model, Recipe.preset(preset, first_last=None))
    for layer in model:
        quantizer: Any = layer.weight_quantizer
        if quantizer is None:
            continue
        size = 8 if "g8" in preset else layer.weight.numel()
        spec = quantizer.spec
        rows = layer.weight.detach().double().reshape(-1, size).numpy()
        for row, step in zip(rows, quantizer.step.tolist(), strict=True):
            assert excess(row, np.ones(size), step, spec.q_min, spec.q_max) <= 1.01
    lsquant.prepare(beside := nn.Sequential(nn.Linear(32, 24)), Recipe(4, 8))
    rule = beside[0].weight_quantizer.step  # type: ignore[union-attr]
    expected = oracle.initial_step(beside[0].weight.detach().numpy(), 7)
    assert rule.item() == pytest.approx(float(expected.item()), rel=1e-6)


def output_error(layer: Any, x: torch.Tensor) -> float:
    return (x @ (layer.weight - layer.dequantized_weight()).T).square().sum().item()


def test_importance_lowers_the_error_of_outputs() -> None:
    torch.manual_seed(0)
    scales = torch.logspace(-2, 1, 64)
    x = torch.randn(256, 64) * scales
    errors = []
    for importance in (False, True):
        torch.manual_seed(1)
        model: Any = nn.Sequential(nn.Linear(64, 32))
        lsquant.prepare(model, Recipe(QuantSpec(3, granularity="channel")))
        lsquant.calibrate(model, [x[:100], x[100:]], weights="mse", importance=importance)
        errors.append(output_error(model[0], x))
        step, row = model[0].weight_quantizer.step[3].item(), model[0].weight[3].detach().double().numpy()
        m = (x.double().square().mean(0) if importance else torch.ones(64)).numpy()
        assert excess(row, m, step, -4, 3) <= 1.001
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("batched", [True, False])
def test_importance_of_convolutions_is_that_of_their_channels(batched: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, 5, 5) * torch.tensor([1.0, 10, 0.1, 1, 5, 0.01])[:, None, None]
    for kind, rows in ((nn.Conv2d, (4, 3, 2, 2)), (nn.ConvTranspose2d, (4, 3, 2, 2))):
        model: Any = nn.Sequential(kind(6, 4, 2, groups=2))
        lsquant.prepare(model, Recipe(QuantSpec(2, granularity="channel")))
        lsquant.calibrate(model, [x] if batched else list(x), weights="mse", importance=True, max_batches=None)
        moments = x.double().square().mean((0, 2, 3)).numpy().reshape(2, 3)
        weight = model[0].rows().detach().double().numpy()
        assert weight.shape == rows
        for o, step in enumerate(model[0].weight_quantizer.step.tolist()):
            v, m = weight[o].reshape(-1), np.repeat(moments[o // 2], 4)
            assert excess(v, m, step, -2, 1) <= 1.001


def test_importance_of_tied_weights_unused_layers_and_wrong_arguments() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.idle = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False), nn.Linear(4, 4)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x) * torch.tensor([1.0, 0.1, 3.0, 0.0]))

    torch.manual_seed(0)
    model: Any = Tied()
    lsquant.prepare(model, Recipe(QuantSpec(4, granularity="channel")))
    x = torch.arange(9)
    with pytest.warns(UserWarning, match="nothing reached idle"):
        lsquant.calibrate(model, [x], weights="mse", importance=True)
    moments = (model.embed.weight.detach()[x] * torch.tensor([1.0, 0.1, 3.0, 0.0])).double().square().mean(0).numpy()
    v, step = model.head.weight[2].detach().double().numpy(), model.head.weight_quantizer.step[2].item()
    assert excess(v, moments, step, -8, 7) <= 1.001
    assert model.idle.weight_quantizer.is_initialized  # nothing is known of its inputs: all count alike
    with pytest.raises(UsageError, match="importance=True goes with weights='mse', not weights=None"):
        lsquant.calibrate(model, [x], importance=True)
    with pytest.raises(UsageError, match="importance=1; it must be True or False"):
        lsquant.calibrate(model, [x], weights="mse", importance=1)  # type: ignore[arg-type]


# ---- the type of the step ----


@pytest.mark.parametrize("step_dtype", ["float16", "bfloat16"])
def test_the_forward_pass_uses_the_rounded_step(step_dtype: Any) -> None:
    quantizer = Quantizer(QuantSpec(4, signed=True, step_dtype=step_dtype), count=16)
    x = torch.randn(16)
    quantizer.initialize(x)
    with torch.no_grad():
        quantizer.step.mul_(1.0 + 1e-4)
    held = np.float32(quantizer.step.item())
    if step_dtype == "float16":
        rounded = np.float32(np.float16(held))
    else:  # the upper 16 bits, rounded half to even
        bits = int(held.view(np.uint32))
        rounded = np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)
    assert rounded != held
    assert quantizer.effective_step().item() == rounded
    v_hat = quantizer(x)
    assert torch.equal(v_hat.detach(), torch.from_numpy(oracle.fake_quantize(x.numpy(), np.array([rounded]), -8, 7)))
    v_hat.sum().backward()
    wanted, _ = oracle.step_gradient(np.ones(16), x.numpy(), np.array([rounded]), -8, 7, oracle.gradient_scale(16, 7))
    assert quantizer.step.grad is not None
    assert quantizer.step.grad.item() == pytest.approx(float(wanted.item()), rel=1e-5)
    assert quantizer.step.dtype == torch.float32


def test_rounded_steps_are_never_zero_or_infinite_and_nan_stays() -> None:
    held = torch.tensor([1e-12, 1e6, 6e-8, float("nan"), float("inf")])
    half = lsquant.reference.snapped(held, "float16").tolist()
    assert half[:3] == [2.0**-24, 65504.0, 2.0**-24]
    assert np.isnan(half[3])
    assert half[4] == float("inf")
    assert lsquant.reference.snapped(torch.tensor([1e-45]), "bfloat16").item() > 0


def test_rounded_steps_are_saved_shipped_and_written_in_recipes(tmp_path: Any) -> None:
    torch.manual_seed(0)
    spec = QuantSpec(4, granularity="group", group_size=8, step_dtype="float16")
    recipe = Recipe(spec)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert "float16" in recipe.to_toml()
    model: Any = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    fresh = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    lsquant.prepare(model, recipe)
    x = torch.randn(3, 16)
    codes, step, _ = model[0].integer_weight()
    assert torch.equal(step, step.half().float())
    assert not torch.equal(step, model[0].weight_quantizer.step)
    lsquant.save(model, tmp_path / "m.safetensors")
    lsquant.load(fresh, tmp_path / "m.safetensors")
    assert torch.equal(fresh(x), model(x))
    assert fresh[0].weight_quantizer.spec == model[0].weight_quantizer.spec  # type: ignore[union-attr]
    again = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    lsquant.load_packed(again, lsquant.export_packed(model, tmp_path / "p.safetensors"))
    assert torch.equal(again(x), model(x))
    assert torch.equal(codes, again[0].integer_weight()[0])  # type: ignore[operator]
    assert lsquant.verify(model, tmp_path / "p.safetensors", [x]).exact


def test_an_offset_and_unknown_types_are_refused() -> None:
    with pytest.raises(UsageError, match="step_dtype='float16' and offset=True do not go together"):
        QuantSpec(4, offset=True, step_dtype="float16")
    with pytest.raises(UsageError, match="step_dtype='half'; use one of float32, float16, bfloat16"):
        QuantSpec(4, step_dtype="half")  # type: ignore[arg-type]
    assert str(QuantSpec(4, signed=True, step_dtype="float16")).endswith("steps in float16")


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e20, 1e30])
def test_steps_follow_the_scale_of_values_and_of_inputs(scale: float) -> None:
    rows = rows_of(3, 20, 32, -8)
    power = 2.0 ** round(math.log2(scale))
    assert torch.equal(row_steps(rows * power, -8, 7), row_steps(rows, -8, 7) * power)
    importance = torch.rand(20, 32)
    wanted = row_steps(rows, -8, 7, importance)
    torch.testing.assert_close(row_steps(rows, -8, 7, importance * scale), wanted, rtol=1e-3, atol=0)


def test_importance_of_bad_inputs_and_of_layers_that_nothing_reaches() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Unused()
    lsquant.prepare(model, Recipe(4))
    with pytest.raises(UsageError, match="the inputs of 'used' are NaN or infinite"):
        lsquant.calibrate(model, [torch.full((2, 4), float("nan"))], weights="mse", importance=True)
    with pytest.warns(UserWarning, match="nothing reached idle"):
        lsquant.calibrate(model, [torch.randn(2, 4)], weights="mse", importance=True)


def test_a_step_that_the_type_does_not_hold_and_stored_tensors() -> None:
    for scale in (1e8, 1e-9):
        quantizer = Quantizer(QuantSpec(4, signed=True, step_dtype="float16"), count=4)
        with pytest.raises(UsageError, match="which float16 does not hold; use step_dtype='bfloat16'"):
            quantizer.initialize(torch.randn(64) * scale)
    half = QuantSpec(8, step_dtype="float16")
    with pytest.raises(UsageError, match="one float32 step each"):
        Recipe(8, 8, joins=half)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(UsageError, match="the step of a stored tensor is float32, not float16"):
        lsquant.prepare(model, Recipe(8, half, joins=8), example_inputs=torch.randn(1, 3, 4, 4))
