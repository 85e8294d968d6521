"""Quantized layers, forward: equal to the oracle bit by bit, in every shape, type and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from helpers.engines import assert_same
from helpers.layers import expected, ready
from lsquant import QuantSpec, Recipe, UsageError

CHANNEL = {"granularity": "channel"}


def check(layer: Any, x: torch.Tensor) -> None:
    want = expected(layer, x)
    assert len(want.unique()) > 3 or not want.numel()
    with torch.no_grad():
        assert_same(layer(x).float(), want.to(x.dtype).float())


# ---- bits and granularities ----

KINDS: dict[str, tuple[Any, Any]] = {
    "2/2": (2, 2),
    "4/4": (4, 4),
    "8/8": (8, 8),
    "3/5": (3, 5),
    "ternary": (QuantSpec(2, narrow=True), QuantSpec(2, narrow=True)),
    "unsigned": (4, QuantSpec(4, signed=False)),
    "signed": (4, QuantSpec(4, signed=True)),
    "channel": (QuantSpec(4, **CHANNEL), 4),
    "group": (QuantSpec(4, granularity="group", group_size=9), 4),
    "group of 3": (QuantSpec(8, granularity="group", group_size=3), 8),
    "LSQ+": (4, QuantSpec(4, offset=True)),
    "LSQ+ signed, channel": (QuantSpec(3, **CHANNEL), QuantSpec(3, offset=True, signed=True)),
    "LSQ+ group": (QuantSpec(4, granularity="group", group_size=9), QuantSpec(8, offset=True)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind, bias):
    x = torch.randn(9, 36) + 0.3
    check(ready(nn.Linear(36, 5, bias=bias), x, *KINDS[kind]), x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_conv2d(kind, bias):
    x = torch.randn(2, 4, 6, 5) + 0.3
    check(ready(nn.Conv2d(4, 6, 3, padding=1, bias=bias), x, *KINDS[kind]), x)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "unequal": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)},
    "two groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "same, dilated": {"kernel_size": (2, 3), "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "reflect, same, even": {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    "replicate, stride": {"kernel_size": 3, "padding": 2, "stride": 2, "padding_mode": "replicate"},
}


@pytest.mark.parametrize("kind", ["4/4", "channel", "LSQ+", "group"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv2d_geometry(geometry, kind):
    options = GEOMETRIES[geometry]
    weight, activation = KINDS[kind]
    layer = nn.Conv2d(4, 8, **options)
    if kind == "group":
        row = layer.weight[0].numel()
        weight = QuantSpec(4, granularity="group", group_size=row // 2 if row % 2 == 0 else row // 3)
    x = torch.randn(2, 4, 7, 6) - 0.2
    check(ready(layer, x, weight, activation), x)


# ---- shapes ----


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (2, 3, 1, 6), (0, 6), (2, 0, 6)])
@pytest.mark.parametrize("kind", ["4/4", "group of 3"])
def test_linear_takes_any_leading_shape(shape, kind):
    layer = ready(nn.Linear(6, 4), torch.randn(20, 6), *KINDS[kind])
    x = torch.randn(shape, requires_grad=True)
    check(layer, x)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert bool(layer.input_quantizer.step.grad.isfinite().all())


def test_conv2d_without_a_batch_dimension():
    x = torch.randn(3, 4, 6, 6)
    layer = ready(nn.Conv2d(4, 5, 3, padding=1), x)
    assert_same(layer(x[1]), layer(x)[1])
    assert_same(layer(x[1]).detach(), expected(layer, x)[1])
    layer = ready(nn.Conv2d(4, 5, 3), x[0])
    assert int(layer.input_quantizer.count) == 4 * 6 * 6


@pytest.mark.parametrize("kind", ["4/4", "group"])
def test_conv2d_of_an_empty_batch(kind):
    layer = ready(nn.Conv2d(2, 4, 3), torch.randn(3, 2, 6, 6), *KINDS[kind])
    x = torch.randn(0, 2, 6, 6, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 4, 4, 4)
    y.sum().backward()
    for parameter in (layer.weight, layer.bias, layer.weight_quantizer.step, layer.input_quantizer.step):
        assert bool((parameter.grad == 0).all())


@pytest.mark.parametrize("channels", [1, 7])
def test_channels_last_keeps_its_layout(channels):
    x = torch.randn(2, channels, 5, 6)
    layer = ready(nn.Conv2d(channels, 4, 3, padding=1), x)
    want = layer(x)
    last = x.to(memory_format=torch.channels_last)
    y = layer.to(memory_format=torch.channels_last)(last)
    assert_same(y, want)
    assert channels == 1 or y.is_contiguous(memory_format=torch.channels_last)
    assert want.is_contiguous()


def test_views_and_strides():
    x = torch.randn(6, 12, 2)[..., 0]
    layer = ready(nn.Linear(12, 5), x)
    assert not x.is_contiguous()
    check(layer, x)
    check(layer, torch.randn(12, 6).t())
    check(layer, torch.randn(1, 12).expand(4, 12))


def test_a_wrong_size_is_an_error_that_names_layer_and_sizes():
    layer = ready(nn.Linear(6, 4), torch.randn(3, 6))
    with pytest.raises(ValueError, match="the input has 5 features or channels, the layer takes 6"):
        layer(torch.randn(3, 5))
    grids = layer.grids()
    with pytest.raises(ValueError, match=r"last dimension is 5, the weight \(4, 6\)"):
        lsquant.ops.linear(torch.randn(3, 5), layer.weight, None, *grids)


# ---- sums that float32 cannot hold ----


def extreme(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Any, torch.Tensor]:
    """Codes that are odd and nearly the largest, so that sums are odd as well: the layer and its input."""
    lsquant.prepare(layer, Recipe(8, QuantSpec(8, signed=False)))
    lsquant.calibrate(layer, [torch.ones(shape)])
    with torch.no_grad():
        layer.weight.copy_((127 - 2 * torch.randint(0, 2, layer.weight.shape)) / 128)
        layer.weight_quantizer.step.fill_(1 / 128)
        layer.input_quantizer.step.fill_(1 / 256)
        layer.bias.zero_()
    return layer, (255 - 2 * torch.randint(0, 2, shape)) / 256


@pytest.mark.parametrize("size", [514, 515, 1024, 3001])
def test_linear_sums_beyond_float32_are_exact(size):
    layer, x = extreme(nn.Linear(size, 8), (16, size))
    assert_same(layer(x).detach(), expected(layer, x))
    x, layer = torch.randn(5, size), nn.Linear(size, 4)
    check(ready(layer, x, 8, 8), x)


@pytest.mark.parametrize("channels", [16, 57, 58, 200])  # bounds from 2^22, just below 2^24, beyond
def test_conv2d_sums_beyond_a_transform_are_exact(channels):
    layer, x = extreme(nn.Conv2d(channels, 4, 3, padding=1), (2, channels, 6, 6))
    assert_same(layer(x).detach(), expected(layer, x))
    bound = channels * 9 * 255 * 128
    assert bound > 2**20
    assert (bound < 2**24) == (channels < 58)


@pytest.mark.parametrize("kind", ["8/8", "4/4"])
def test_conv2d_where_a_transform_may_be_chosen(kind):
    x = torch.randn(2, 32, 12, 12)
    check(ready(nn.Conv2d(32, 8, 3, padding=1), x, *KINDS[kind]), x)


# ---- types ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make, shape", [(nn.Linear, (7, 12)), (nn.Conv2d, (2, 12, 5, 5))])
def test_low_precision_models(make, shape, dtype):
    x = torch.randn(shape).to(dtype)
    layer = (nn.Linear(12, 5) if make is nn.Linear else nn.Conv2d(12, 5, 3)).to(dtype)
    ready(layer, x)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.weight_quantizer.step.dtype == layer.input_quantizer.step.dtype == torch.float32
    check(layer, x)
    y.sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == dtype
    assert layer.weight_quantizer.step.grad.dtype == torch.float32


def test_a_model_turned_to_bfloat16_keeps_its_steps():
    x = torch.randn(7, 12)
    layer = ready(nn.Linear(12, 5), x)
    steps = [layer.weight_quantizer.step.detach().clone(), layer.input_quantizer.step.detach().clone()]
    layer.bfloat16()
    assert torch.equal(layer.weight_quantizer.step, steps[0])
    assert torch.equal(layer.input_quantizer.step, steps[1])
    check(layer, x.bfloat16())


@pytest.mark.parametrize("make, shape", [(nn.Linear, (7, 300)), (nn.Conv2d, (2, 40, 5, 5))])
@pytest.mark.parametrize("low_input", [False, True])
def test_autocast_rounds_the_output_and_nothing_else(make, shape, low_input):
    x = torch.randn(shape)
    layer = ready(nn.Linear(300, 5) if make is nn.Linear else nn.Conv2d(40, 5, 3), x, 8, 8)
    x = (x.bfloat16() if low_input else x).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_same(y.detach(), expected(layer, x).bfloat16())
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert x.grad.dtype == x.dtype


@pytest.mark.parametrize("engine", ["eager", "cpp"])
def test_under_autocast_the_two_backward_products_are_computed_in_its_dtype(engine):
    x = (torch.rand(9, 40) * 1.2 - 0.6).requires_grad_()
    layer = ready(nn.Linear(40, 6, bias=False), x.detach(), 8, 8)
    for quantizer in layer.own_quantizers():
        quantizer.step.data.fill_(2.0**-6)  # everything is inside
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    up = torch.randn(9, 6).bfloat16()
    of_x, of_weight = torch.autograd.grad(y, (x, layer.weight), up)
    x_hat, w_hat = (torch.round(t.detach() * 64) / 64 for t in (x, layer.weight))
    assert_same(of_weight, (up.t() @ x_hat.bfloat16()).float())
    assert_same(of_x, (up @ w_hat.bfloat16()).float())
    assert not torch.equal(of_x, up.float() @ w_hat), "float32 would give something else"


# ---- NaN and infinity ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["4/4", "8/8", "group of 3", "LSQ+"])
def test_what_is_not_finite_poisons_what_it_feeds(bad, kind):
    size = 600 if kind == "8/8" else 36
    x = torch.randn(4, size)
    layer = ready(nn.Linear(size, 3), x, *KINDS[kind])
    x[2, 5] = bad
    x.requires_grad_()
    y = layer(x)
    assert bool(y[2].isnan().all())
    y.sum().backward()
    assert bool(layer.input_quantizer.step.grad.isnan().all())
    images = torch.randn(2, 3, 6, 6)
    conv = ready(nn.Conv2d(3, 4, 3, padding=1), images, *KINDS[kind])
    images[1, 2, 0, 5] = bad
    want = expected(conv, images).isnan()
    assert 0 < int(want.sum()) < want.numel()
    assert bool(conv(images)[want].isnan().all())


def test_a_weight_that_is_not_finite_poisons_its_channel():
    x = torch.randn(4, 6)
    layer = ready(nn.Linear(6, 3), x)
    with torch.no_grad():
        layer.weight[1, 2] = float("nan")
    assert bool(layer(x)[:, 1].isnan().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_an_offset_that_is_not_finite_makes_the_output_nan(kind, train, bad):
    layer = nn.Linear(6, 4) if kind == "linear" else nn.Conv2d(3, 4, 3)
    model, x = nn.Sequential(layer).train(train), torch.randn(5, 3, 6, 6)
    lsquant.prepare(model, Recipe(4, QuantSpec(8, offset=True)))
    lsquant.calibrate(model, [x])
    with torch.no_grad():
        model[0].input_quantizer.offset.fill_(bad)
    y = model(x)
    assert bool(y.isnan().all())
    y.sum().backward()
    assert bool(model[0].input_quantizer.step.grad.isnan().all())
    with pytest.raises(UsageError, match=r"0\.input_quantizer.*offset"):
        lsquant.to_integer(model)


@pytest.mark.parametrize("which", ["weight_quantizer", "input_quantizer"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_makes_the_output_nan(which, bad):
    x = torch.randn(4, 6)
    layer = ready(nn.Linear(6, 3), x)
    with torch.no_grad():
        getattr(layer, which).step.fill_(bad)
    assert bool(layer(x).isnan().all())
