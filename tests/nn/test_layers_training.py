"""Quantized layers, backward: the gradients of section 1, what is kept for them; half-quantized and compiled layers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lsquant
import oracle
from helpers.engines import BOUND, assert_same, assert_within
from helpers.layers import array, ready
from lsquant import QuantSpec, Recipe, Rule, quantizer, reference
from lsquant.nn import quantizers

GROUP = QuantSpec(4, granularity="group", group_size=9)
KINDS: dict[str, tuple[Any, Any]] = {
    "2/2": (2, 2),
    "8/8": (8, 8),
    "unsigned": (4, QuantSpec(4, signed=False)),
    "channel": (QuantSpec(4, granularity="channel"), 4),
    "group": (GROUP, 4),
    "LSQ+": (4, QuantSpec(4, offset=True)),
}
LAYERS = {
    "linear": (lambda: nn.Linear(36, 5), (9, 36)),
    "linear 3-d": (lambda: nn.Linear(36, 5), (3, 2, 36)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 6, 5)),
    "conv, stride": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2), (2, 4, 7, 6)),
    "conv, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "conv, same, reflect": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (2, 4, 5, 5)),
}


def made(name: str, kind: str) -> tuple[Any, torch.Tensor]:
    make, shape = LAYERS[name]
    x = torch.randn(shape) + 0.2
    return ready(make(), x, *KINDS[kind]), x


def leaves(layer: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {
        "x": x,
        "weight": layer.weight,
        "w step": layer.weight_quantizer.step,
        "x step": layer.input_quantizer.step,
    }
    if layer.bias is not None:
        found["bias"] = layer.bias
    if layer.input_quantizer.offset is not None:
        found["offset"] = layer.input_quantizer.offset
    return found


def by_autograd(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The slow way: the reference's fake quantization in front of the float layer's function."""
    xq, wq = layer.input_quantizer, layer.weight_quantizer
    if isinstance(layer, nn.Conv2d):
        x, padding = layer.padded(x)
    args = (xq.effective_step(), xq.q_min, xq.q_max, xq.gradient_scale)
    x_hat = reference.fake_quantize(x, *args, offset=xq.offset)
    kind = {"axis": wq.axis, "group_size": wq.spec.group_size}
    args = (wq.effective_step(), wq.q_min, wq.q_max, wq.gradient_scale)
    w_hat = reference.fake_quantize(layer.weight, *args, **kind)
    if isinstance(layer, nn.Linear):
        return F.linear(x_hat, w_hat, layer.bias)
    return F.conv2d(x_hat, w_hat, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_fake_quantization_and_the_float_layer(name, kind):
    layer, x = made(name, kind)
    x.requires_grad_()
    wanted = leaves(layer, x)
    y = by_autograd(layer, x)
    upstream = torch.randn_like(y)
    want = torch.autograd.grad(y, list(wanted.values()), upstream)
    got = torch.autograd.grad(layer(x), list(wanted.values()), upstream)
    for leaf, mine, theirs in zip(wanted, got, want, strict=True):
        scale = theirs.abs().max().item()
        assert scale > 0, leaf
        assert (mine - theirs).abs().max().item() <= 3e-5 * scale, leaf
        assert torch.equal(mine == 0, theirs == 0) or leaf not in ("x", "weight"), leaf


@pytest.mark.parametrize("name", ["linear", "conv", "conv, groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_the_oracle(name, kind):
    """Steps that are powers of two and small integers upstream: the float layer's own sums are exact in any order."""
    layer, x = made(name, kind)
    xq, wq = layer.input_quantizer, layer.weight_quantizer
    with torch.no_grad():
        for quantizer in (xq, wq):
            quantizer.step.copy_(torch.exp2(torch.log2(quantizer.step).round()))
        x.copy_((x * 1000).round() / 1000)
    x.requires_grad_()
    y = layer(x)
    upstream = torch.randint(-3, 4, y.shape).float()
    wanted = leaves(layer, x)
    got = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), upstream), strict=True))

    plus = xq.offset is not None
    s_x, s_w = array(xq.step), array(wq.step)
    z = float(oracle.lsq_plus_zero_point(array(xq.offset), s_x, xq.q_min, xq.q_max)[0]) if plus else 0
    layout = {"axis": wq.axis, "group_size": wq.spec.group_size}
    x_hat = torch.tensor(oracle.fake_quantize(array(x), s_x, xq.q_min, xq.q_max, z)).double().requires_grad_()
    w_hat = oracle.fake_quantize(array(layer.weight), s_w, wq.q_min, wq.q_max, **layout)
    w_hat = torch.tensor(w_hat).double().requires_grad_()
    if isinstance(layer, nn.Linear):
        plain = F.linear(x_hat, w_hat)
    else:
        plain = F.conv2d(x_hat, w_hat, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    up_x, up_w = (g.numpy() for g in torch.autograd.grad(plain, [x_hat, w_hat], upstream.double()))
    assert np.array_equal(up_x.astype(np.float32), up_x)

    args_x, args_w = (array(x), s_x, xq.q_min, xq.q_max), (array(layer.weight), s_w, wq.q_min, wq.q_max)
    assert_same(got["x"], torch.tensor(oracle.element_gradient(up_x, *args_x, z)))
    assert_same(got["weight"], torch.tensor(oracle.element_gradient(up_w, *args_w, **layout)))
    features = 36 if isinstance(layer, nn.Linear) else x[0].numel()
    g_x = oracle.gradient_scale(features, xq.q_max)
    g_w = oracle.gradient_scale(layer.weight.numel() // len(s_w), wq.q_max)
    assert_within(got["x step"], *oracle.step_gradient(up_x, *args_x, g_x, z, lsq_plus=plus))
    assert_within(got["w step"], *oracle.step_gradient(up_w, *args_w, g_w, **layout))
    if plus:
        assert_within(got["offset"], *oracle.offset_gradient(up_x, *args_x, g_x, z))
    if layer.bias is not None:
        assert_same(got["bias"], upstream.sum([d for d in range(y.dim()) if d != (y.dim() - 1 if y.dim() == 2 else 1)]))
    assert BOUND < 2e-5


def test_frozen_parts_get_no_gradient():
    layer, x = made("conv", "2/2")
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.input_quantizer.step.grad is not None
    layer, x = made("linear", "2/2")
    layer.weight.requires_grad_(False)
    layer.input_quantizer.step.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is None
    assert layer.input_quantizer.step.grad is None
    assert x.grad is not None
    assert layer.weight_quantizer.step.grad is not None


def test_a_second_derivative_is_a_clear_error():
    layer, x = made("linear", "2/2")
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["linear", "conv", "conv, same, reflect"])
@pytest.mark.parametrize("kind", ["2/2", "group", "LSQ+"])
def test_a_layer_keeps_its_input_weight_and_steps_and_nothing_else(name, kind):
    layer, x = made(name, kind)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x.requires_grad_())
    assert y.requires_grad
    large = [t for t in kept if t.numel() > layer.weight_quantizer.step.numel()]
    others = {t.data_ptr() for t in large} - {layer.weight.data_ptr(), x.data_ptr()}
    assert len(others) == ("reflect" in name)  # the padded input, beside the input that padding itself keeps
    assert len(kept) <= 5 + ("reflect" in name)


# ---- one half in floating point ----


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("spec", [4, QuantSpec(3, granularity="channel"), GROUP])
def test_weight_only(name, spec):
    make, shape = LAYERS[name]
    layer, x = ready(make(), torch.randn(shape), spec, None), torch.randn(shape)
    assert layer.input_quantizer is None
    codes, step, zero = layer.integer_weight()
    assert zero is None
    other = make()
    kind = {"axis": 0} if layer.weight_quantizer.axis == 0 else {"group_size": layer.weight_quantizer.spec.group_size}
    with torch.no_grad():
        q_min, q_max = oracle.bounds(layer.weight_quantizer.spec.bits, signed=True)
        values = oracle.fake_quantize(array(layer.weight), array(step), q_min, q_max, **kind)
        other.weight.copy_(torch.tensor(values))
        if other.bias is not None:
            other.bias.copy_(layer.bias)
    assert_same(layer(x), other(x))
    spread = oracle.spread(array(step), values.shape, **kind)
    assert np.array_equal(codes.numpy() * spread, values)
    layer(x).sum().backward()
    assert bool((layer.weight_quantizer.step.grad != 0).any())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("spec", [4, QuantSpec(4, offset=True)])
def test_activation_only(name, spec):
    make, shape = LAYERS[name]
    x = torch.randn(shape)
    layer = ready(make(), x, None, spec)
    assert layer.weight_quantizer is None
    other = make()
    other.load_state_dict({k: v for k, v in layer.state_dict().items() if "quantizer" not in k})
    q, z = layer.input_quantizer, 0.0
    if q.offset is not None:
        z = float(q.zero_point())
    x_hat = oracle.fake_quantize(array(x), array(q.step), q.q_min, q.q_max, z)
    assert_same(layer(x), other(torch.tensor(x_hat)))
    layer(x).sum().backward()
    assert q.step.grad is not None
    with pytest.raises(ValueError, match="weight is not quantized"):
        layer.integer_weight()


# ---- compiled ----


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def train_step(model: nn.Module, run: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(lsquant.param_groups(model, lr=0.1), momentum=0.9)
    found = {}
    for _ in range(2):
        optimizer.zero_grad()
        loss = run(x).square().sum()
        loss.backward()
        optimizer.step()
    found["loss"] = loss.detach()
    return found | {name: t.detach().clone() for name, t in model.state_dict().items()}


# torch's own: dynamo makes an instance of autograd.Function while it traces one, inductor imports torch.jit
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["train", pytest.param("eval", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend, mode):
    model, x = net(), torch.randn(4, 2, 8, 8)
    weight, activation = QuantSpec(4, granularity="channel"), QuantSpec(4, offset=True)
    lsquant.prepare(model, Recipe(weight, activation, [Rule("0", 2, 2)]))
    lsquant.calibrate(model, [x])
    model.train(mode == "train")
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    if mode == "train":
        want, got = train_step(model, model, x), train_step(other, compiled, x)
    else:
        want, got = {"y": model(x)}, {"y": compiled(x)}
    for name, value in want.items():
        if backend == "aot_eager":
            assert torch.equal(got[name], value), name
        else:
            assert torch.allclose(got[name].double(), value.double(), rtol=1e-4, atol=1e-5), name


def test_an_accelerator_reads_no_tensor_back_in_training(monkeypatch):
    monkeypatch.setattr(quantizer, "CPU_IS_READ_ALWAYS", False)  # the CPU stands for an accelerator
    model, x = net(), torch.randn(4, 2, 8, 8)
    lsquant.prepare(model, Recipe(4, QuantSpec(4, offset=True)))
    lsquant.calibrate(model, [x])

    def forbidden(*_: Any) -> None:
        raise AssertionError("a tensor was read back")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    model(x).sum().backward()
    monkeypatch.undo()
    assert len(list(quantizers(model))) == 6
