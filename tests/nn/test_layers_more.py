"""Convolutions of one and three dimensions, transposed ones, transformers' Conv1D: oracle, gradients, copies, types."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lsquant
import oracle
from helpers.engines import assert_same
from helpers.layers import ready
from helpers.layers_more import CHANNEL, KINDS, LAYERS, TRANSPOSED, expected, made
from lsquant import QuantSpec, Recipe, reference
from lsquant._util.errors import UsageError

every_layer = pytest.mark.parametrize("name", LAYERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@every_layer
def test_forward(name, kind):
    layer, x = made(name, kind)
    want = expected(layer, x)
    assert len(want.unique()) > 3
    assert_same(layer(x).detach(), want)
    assert len(layer.weight_quantizer.step) == (want.shape[-1 if name == "Conv1D" else 1] if "channel" in kind else 1)


@every_layer
def test_the_oracle_has_the_geometry_of_torch(name):
    """With steps of 1 and integers the oracle is the float layer."""
    layer, shape = LAYERS[name][0](), LAYERS[name][1]
    x = torch.randint(-8, 8, shape).float()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randint(-8, 8, p.shape))
    want = layer(x).detach()
    lsquant.prepare(layer, Recipe(8, QuantSpec(8, signed=True)))
    lsquant.calibrate(layer, [x])
    with torch.no_grad():
        layer.weight_quantizer.step.fill_(1.0)
        layer.input_quantizer.step.fill_(1.0)
    assert_same(expected(layer, x), want)
    assert_same(layer(x).detach(), want)


def by_autograd(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Reference fake quantization in front of the float layer's function."""
    xq, wq = layer.input_quantizer, layer.weight_quantizer
    dims = layer.weight.dim() - 2
    if getattr(layer, "padding_mode", "zeros") != "zeros" or layer.__dict__.get("padding") == "same":
        x, padding = layer.padded(x)
    else:
        padding = layer.__dict__.get("padding", 0)
    x_hat = reference.fake_quantize(x, xq.effective_step(), xq.q_min, xq.q_max, xq.gradient_scale, offset=xq.offset)
    args = (wq.effective_step(), wq.q_min, wq.q_max, wq.gradient_scale)
    if not dims:
        return x_hat @ reference.fake_quantize(layer.weight, *args, axis=None if len(args[0]) == 1 else 1) + layer.bias
    if not isinstance(layer, TRANSPOSED):
        w_hat = reference.fake_quantize(layer.weight, *args, axis=None if len(args[0]) == 1 else 0)
        conv = {1: F.conv1d, 3: F.conv3d}[dims]
        return conv(x_hat, w_hat, layer.bias, layer.stride, padding, layer.dilation, layer.groups)
    side_by_side = torch.cat(layer.weight.chunk(layer.groups), 1)  # (C / groups, O, *kernel)
    w_hat = reference.fake_quantize(side_by_side, *args, axis=None if len(args[0]) == 1 else 1)
    w_hat = torch.cat(w_hat.chunk(layer.groups, 1))
    conv = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    return conv(x_hat, w_hat, layer.bias, layer.stride, padding, layer.output_padding, layer.groups, layer.dilation)


@every_kind
@every_layer
def test_gradients_are_those_of_fake_quantization_and_the_float_layer(name, kind):
    layer, x = made(name, kind)
    x = (1.5 * x).requires_grad_()  # some are clipped
    wanted = {"x": x, **dict(layer.named_parameters())}
    y = by_autograd(layer, x)
    upstream = torch.randn_like(y)
    want = torch.autograd.grad(y, list(wanted.values()), upstream)
    got = torch.autograd.grad(layer(x), list(wanted.values()), upstream)
    for leaf, mine, theirs in zip(wanted, got, want, strict=True):
        scale = theirs.abs().max().item()
        assert scale > 0, leaf
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max().item() <= 3e-5 * scale, leaf
        assert torch.equal(mine == 0, theirs == 0) or leaf not in ("x", "weight"), leaf


@every_layer
def test_n_of_section_1(name):
    layer, x = made(name, "channel")
    features = x.shape[-1] if name == "Conv1D" else x[0].numel()
    assert int(layer.input_quantizer.count) == features
    assert int(layer.weight_quantizer.count) == layer.weight.numel() // len(layer.weight_quantizer.step)
    want = oracle.gradient_scale(features, layer.input_quantizer.q_max)
    assert layer.input_quantizer.gradient_scale == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("half", ["weight", "activation"])
@every_layer
def test_one_half_in_floating_point(name, half):
    make, shape = LAYERS[name]
    x, layer = torch.randn(shape), make()
    other = copy.deepcopy(layer)
    lsquant.prepare(layer, Recipe(CHANNEL, None) if half == "weight" else Recipe(None, 4))
    if half == "activation":  # values that are only copied by the padding are quantized before or after it
        lsquant.calibrate(layer, [x])
        assert_same(layer(x), other(layer.input_quantizer(x)))
        return
    codes, step, zero = layer.integer_weight()
    assert zero is None
    assert codes.shape == layer.weight.shape
    if isinstance(layer, TRANSPOSED):
        steps = step[torch.tensor(oracle.output_channels(tuple(codes.shape), layer.groups))]
    else:
        steps = step.reshape(-1, *[1] * (codes.dim() - 1)) if name != "Conv1D" else step
    with torch.no_grad():
        other.weight.copy_(codes * steps)
    assert_same(layer(x), other(x))
    layer(x).sum().backward()
    assert bool((layer.weight_quantizer.step.grad != 0).any())


# ---- sizes ----


@every_layer
def test_without_a_batch_dimension(name):
    layer, x = made(name, "channel")
    assert_same(layer(x[1]), layer(x)[1])
    assert layer(x[:0]).shape == (0, *layer(x).shape[1:])


@pytest.mark.parametrize("size", [11, 12, 13, [12], [2, 6, 12]])
def test_output_size(size):
    layer, x = ready(nn.ConvTranspose1d(4, 6, 3, stride=3, padding=2, groups=2), torch.randn(2, 4, 5)), None
    x = torch.randn(2, 4, 5)
    wanted = size if isinstance(size, list) else [size]
    length = wanted[-1]
    assert_same(layer(x, output_size=wanted).detach(), expected(layer, x, length - 11))
    assert layer(x, wanted).shape == (2, 6, length)


@pytest.mark.parametrize("size", [[10], [14]])
def test_an_output_size_out_of_reach(size):
    layer = ready(nn.ConvTranspose1d(4, 6, 3, stride=3, padding=2), torch.randn(2, 4, 5))
    with pytest.raises(UsageError, match=r"output_size=.*smallest is \[11\], stride \(3,\)"):
        layer(torch.randn(2, 4, 5), output_size=size)


@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith(("conv1d", "conv3d", "transposed"))])
def test_groups_of_weights_are_refused(name):
    layer = LAYERS[name][0]()
    spec = QuantSpec(4, granularity="group", group_size=2)
    with pytest.raises(UsageError, match="no group-wise steps; use 'channel'"):
        lsquant.prepare(nn.Sequential(layer), Recipe(spec, 4))
    assert not hasattr(layer, "weight_quantizer")


@pytest.mark.parametrize("name", ["conv3d", "transposed2d", "conv1d"])
def test_what_is_not_finite_poisons_what_it_feeds(name):
    layer, x = made(name, "channel")
    x[(1, 2, *[0] * (x.dim() - 2))] = float("inf")
    want = expected(layer, x).isnan()
    assert 0 < int(want.sum()) < want.numel()
    assert bool(layer(x)[want].isnan().all())


# ---- state, copies, types ----


@every_layer
def test_names_checkpoints_and_revert(name):
    make, _ = LAYERS[name]
    layer, x = made(name, "channel")
    plain = make()
    floats = set(plain.state_dict())
    keys = {"step", "initial_step", "signed", "count", "initialized", "bounds"}
    extra = {f"{q}_quantizer.{key}" for q in ("weight", "input") for key in keys}
    assert set(layer.state_dict()) == floats | extra
    before = layer.input_quantizer.step.detach().clone()
    layer.load_state_dict(plain.state_dict(), strict=True)  # steps of the weight anew, those of the input as they were
    fresh = make()
    fresh.load_state_dict(plain.state_dict())
    lsquant.prepare(fresh, Recipe(*KINDS["channel"]))
    assert_same(layer.weight_quantizer.step, fresh.weight_quantizer.step)
    assert_same(layer.input_quantizer.step, before)
    fresh.load_state_dict(layer.state_dict(), strict=True)  # and without calibration
    assert_same(fresh(x), layer(x))
    parameter = layer.weight
    lsquant.revert(layer)
    assert type(layer) is type(plain)
    assert layer.weight is parameter
    assert set(layer.state_dict()) == floats
    assert_same(layer(x), plain(x))


@every_layer
def test_copies(name):
    layer, x = made(name, "channel")
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(other(x), want)
        with torch.no_grad():
            other.weight_quantizer.step.mul_(2.0)
        assert not torch.equal(other(x), want)
    assert_same(layer(x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_layer
def test_low_precision_models(name, dtype):
    layer, x = made(name, "channel")
    step = layer.input_quantizer.step.detach().clone()
    layer.to(dtype)
    assert layer.weight_quantizer.step.dtype == torch.float32
    assert_same(layer.input_quantizer.step.detach(), step)
    x = x.to(dtype)
    y = layer(x)
    assert_same(y.detach(), expected(layer, x).to(dtype))
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == dtype
    assert layer.weight_quantizer.step.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["conv1d", "transposed2d", "conv3d", "Conv1D"])
def test_autocast_rounds_the_output_and_nothing_else(name):
    layer, x = made(name, "tensor")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert_same(y.detach(), expected(layer, x).bfloat16())
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("sides", ["weights", "switched off"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(4, 6, 2),
        nn.ConvTranspose1d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose3d(4, 6, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_autocast_takes_a_float_convolution_behind_another_layer(layer, sides):
    """Found by the fuzzer: an input of bfloat16 and a weight of float32, where only one side is quantized."""
    model = nn.Sequential(copy.deepcopy(layer))
    x = torch.randn(2, 4, *[5] * (layer.weight.dim() - 2))
    lsquant.prepare(model, Recipe(4) if sides == "weights" else Recipe(4, 4))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), lsquant.disabled(model):
        want = layer(x.bfloat16())
        assert_same(model(x.bfloat16()), want)
    if sides == "weights":
        values = model[0].dequantized_weight()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            want = torch.func.functional_call(layer, {"weight": values}, (x.bfloat16(),))
            assert_same(model(x.bfloat16()), want)


# torch's own: dynamo makes an instance of autograd.Function while it traces one
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["conv1d, same, even, circular", "transposed2d", "transposed3d, all", "Conv1D"])
def test_compiled_equals_eager(name):
    layer, x = made(name, "channel")
    torch._dynamo.reset()
    assert_same(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "granularity"),
    [(m, g) for m in (nn.Linear(8, 8), nn.Conv2d(4, 8, 3, groups=2)) for g in ("tensor", "channel", "group")]
    + [(nn.ConvTranspose2d(4, 6, 2, groups=2), g) for g in ("tensor", "channel")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_dequantized_weight_is_what_the_layer_multiplies_with(layer, granularity):
    model = nn.Sequential(copy.deepcopy(layer))
    spec = QuantSpec(4, granularity=granularity, group_size=2 if granularity == "group" else None)
    lsquant.prepare(model, Recipe(spec))
    x = torch.randn(2, 8) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    values = model[0].dequantized_weight()
    assert not torch.equal(values, layer.weight)
    assert torch.equal(model(x), torch.func.functional_call(layer, {"weight": values}, (x,)))


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_transposed_convolution_in_channels_last_has_the_gradients_of_the_other_layout(dilation):
    """PyTorch's backward kernel for dilated ones wants a contiguous weight; found by the fuzzer."""
    layer = nn.ConvTranspose2d(1, 2, (1, 2), output_padding=(0, dilation - 1), dilation=(1, dilation), bias=False)
    model, x = nn.Sequential(layer), torch.randn(4, 2, 1, 2)
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.calibrate(model, [x[:, :1]])
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    model(x[:, :1]).square().sum().backward()
    twin(x.to(memory_format=torch.channels_last)[:, :1]).square().sum().backward()
    for (name, p), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, p.grad, msg=name)


@pytest.mark.parametrize("name", ["conv1d", "transposed2d", "Conv1D"])
def test_float64_stays_float64_under_autocast_as_in_pytorch(name):
    layer, x = made(name, "tensor")
    layer, x = layer.double(), x.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(torch.ones(1, 2).double(), torch.ones(3, 2).double()).dtype == torch.float64
