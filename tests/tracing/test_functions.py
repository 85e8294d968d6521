"""Each function that becomes a module, and those that do not: the same bits forward and backward, in both modes."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lsquant
from helpers.traceable import assert_equal_runs, traced
from lsquant import nn as q


class Body(nn.Module):
    """Two convolutions and a function of their outputs; its own parameters for those that want some."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.function = function
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("shift", torch.rand(4, 1, 1))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, self.first(x), self.second(x))


def in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that changes its first argument, which is what counts afterwards."""

    def forward(self: Body, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        function(a, b)
        return a * 2

    return forward


def iadd(s: Body, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    alias = a
    a += b
    return alias - 0.5


def imul(s: Body, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a *= b
    return a


REPLACED: dict[str, tuple[Callable[..., Any], dict[str, type[nn.Module]]]] = {
    "+": (lambda s, a, b: a + b, {"add": q.Add}),
    "+=": (iadd, {"add": q.Add}),
    "torch.add": (lambda s, a, b: torch.add(a, b), {"add": q.Add}),
    "add": (lambda s, a, b: a.add(b), {"add": q.Add}),
    "add_": (in_place(lambda a, b: a.add_(b)), {"add": q.Add}),
    "three": (lambda s, a, b: a + b + a, {"add": q.Add, "add_2": q.Add}),
    "*": (lambda s, a, b: a * b, {"mul": q.Mul}),
    "*=": (imul, {"mul": q.Mul}),
    "torch.mul": (lambda s, a, b: torch.mul(a, b), {"mul": q.Mul}),
    "mul_": (in_place(lambda a, b: a.mul_(b)), {"mul": q.Mul}),
    "torch.cat": (lambda s, a, b: torch.cat([a, b], 1), {"cat": q.Cat}),
    "torch.concat": (lambda s, a, b: torch.concat((a, b), dim=-1), {"cat": q.Cat}),
    "F.relu": (lambda s, a, b: F.relu(a), {"relu": nn.ReLU}),
    "F.relu in place": (in_place(lambda a, b: F.relu(a, inplace=True)), {"relu": nn.ReLU}),
    "torch.relu": (lambda s, a, b: torch.relu(a), {"relu": nn.ReLU}),
    "relu": (lambda s, a, b: a.relu(), {"relu": nn.ReLU}),
    "relu_": (in_place(lambda a, b: a.relu_()), {"relu": nn.ReLU}),
    "F.relu_": (in_place(lambda a, b: F.relu_(a)), {"relu": nn.ReLU}),
    "F.elu_": (in_place(lambda a, b: F.elu_(a, 0.7)), {"elu": nn.ELU}),
    "sigmoid_": (in_place(lambda a, b: a.sigmoid_()), {"sigmoid": nn.Sigmoid}),
    "torch.tanh_": (in_place(lambda a, b: torch.tanh_(a)), {"tanh": nn.Tanh}),
    "F.silu in place": (in_place(lambda a, b: F.silu(a, inplace=True)), {"silu": nn.SiLU}),
    "F.relu6": (lambda s, a, b: F.relu6(a * 9), {"relu6": nn.ReLU6}),
    "F.hardtanh": (lambda s, a, b: F.hardtanh(a, -0.2, max_val=0.3), {"hardtanh": nn.Hardtanh}),
    "F.leaky_relu": (lambda s, a, b: F.leaky_relu(a, 0.2), {"leaky_relu": nn.LeakyReLU}),
    "F.elu": (lambda s, a, b: F.elu(a, alpha=0.5), {"elu": nn.ELU}),
    "clamp": (lambda s, a, b: a.clamp(0, 0.5), {"clip": q.Clip}),
    "clamp_": (in_place(lambda a, b: a.clamp_(max=0.5)), {"clip": q.Clip}),
    "torch.clip": (lambda s, a, b: torch.clip(a, min=0), {"clip": q.Clip}),
    "clamp_min": (lambda s, a, b: a.clamp_min(0.1), {"clip": q.Clip}),
    "F.silu": (lambda s, a, b: F.silu(a), {"silu": nn.SiLU}),
    "F.mish": (lambda s, a, b: F.mish(a), {"mish": nn.Mish}),
    "F.hardswish": (lambda s, a, b: F.hardswish(a), {"hardswish": nn.Hardswish}),
    "F.hardsigmoid": (lambda s, a, b: F.hardsigmoid(a), {"hardsigmoid": nn.Hardsigmoid}),
    "swish by hand": (lambda s, a, b: a * torch.sigmoid(a), {"sigmoid": nn.Sigmoid, "mul": q.Mul}),
    "sigmoid": (lambda s, a, b: a.sigmoid(), {"sigmoid": nn.Sigmoid}),
    "F.sigmoid": (lambda s, a, b: F.sigmoid(a), {"sigmoid": nn.Sigmoid}),
    "tanh": (lambda s, a, b: torch.tanh(a), {"tanh": nn.Tanh}),
    "F.gelu": (lambda s, a, b: F.gelu(a), {"gelu": nn.GELU}),
    "F.gelu tanh": (lambda s, a, b: F.gelu(a, approximate="tanh"), {"gelu": nn.GELU}),
    "F.max_pool2d": (lambda s, a, b: F.max_pool2d(a, 2), {"max_pool": nn.MaxPool2d}),
    "torch.max_pool2d": (lambda s, a, b: torch.max_pool2d(a, (3, 2), stride=2, padding=1), {"max_pool": nn.MaxPool2d}),
    "F.max_pool1d": (lambda s, a, b: F.max_pool1d(a[:, 0], 3, 2), {"slice": q.Slice, "max_pool": nn.MaxPool1d}),
    "F.avg_pool2d": (lambda s, a, b: F.avg_pool2d(a, 3, 1, 1, False, False), {"avg_pool": nn.AvgPool2d}),
    "F.avg_pool1d": (lambda s, a, b: F.avg_pool1d(a[..., 0], 2), {"slice": q.Slice, "avg_pool": nn.AvgPool1d}),
    "adaptive": (lambda s, a, b: F.adaptive_avg_pool2d(a, (None, 2)), {"avg_pool": nn.AdaptiveAvgPool2d}),
    "adaptive max": (lambda s, a, b: F.adaptive_max_pool2d(a, 1), {"max_pool": nn.AdaptiveMaxPool2d}),
    "mean": (lambda s, a, b: a.mean((2, 3)), {"mean": q.Mean}),
    "mean keepdim": (lambda s, a, b: torch.mean(a, dim=[-1, -2], keepdim=True), {"mean": q.Mean}),
    "torch.flatten": (lambda s, a, b: torch.flatten(a, 1), {"flatten": nn.Flatten}),
    "flatten some": (lambda s, a, b: a.flatten(1, 2), {"flatten": nn.Flatten}),
    "view size": (lambda s, a, b: a.view(a.size(0), -1), {"flatten": nn.Flatten}),
    "view tuple": (lambda s, a, b: a.view((a.shape[0], -1)), {"flatten": nn.Flatten}),
    "view -1": (lambda s, a, b: a.view(-1, 144), {"flatten": nn.Flatten}),
    "reshape": (lambda s, a, b: torch.reshape(a, (b.size()[0], -1)), {"flatten": nn.Flatten}),
    "F.pad zeros": (lambda s, a, b: F.pad(a, (1, 0, 2, 1)), {"pad": nn.ZeroPad2d}),
    "F.pad value": (lambda s, a, b: F.pad(a, [1, 0, 2, 1], value=-1.0), {"pad": nn.ConstantPad2d}),
    "F.pad channels": (lambda s, a, b: F.pad(a, (0, 0, 0, 0, 2, 1)), {"pad": nn.ConstantPad3d}),
    "F.pad last": (lambda s, a, b: F.pad(a, (1, 1), "constant", 0.5), {"pad": nn.ConstantPad1d}),
    "slice": (lambda s, a, b: a[:, :2], {"slice": q.Slice}),
    "slice step": (lambda s, a, b: a[..., ::2, 1:-1], {"slice": q.Slice}),
    "select": (lambda s, a, b: a[:, 1], {"slice": q.Slice}),
    "narrow": (lambda s, a, b: a.narrow(1, 1, 2), {"slice": q.Slice}),
    "chunk": (lambda s, a, b: a.chunk(2, 1)[1], {"chunk": q.Chunk}),
    "unpacked": (lambda s, a, b: [x * 2 for x in torch.chunk(a, 2, dim=1)], {"chunk": q.Chunk}),
    "split": (lambda s, a, b: a.split([1, 3], 1), {"split": q.Split}),
    "torch.split": (lambda s, a, b: torch.split(a, 2, dim=-1)[0], {"split": q.Split}),
    "upsample": (lambda s, a, b: F.interpolate(a, scale_factor=2), {"upsample": nn.Upsample}),
    "upsample size": (lambda s, a, b: F.interpolate(a, (9, 8), mode="nearest"), {"upsample": nn.Upsample}),
    "resize": (lambda s, a, b: F.interpolate(a[..., ::2], b.shape[2:]), {"slice": q.Slice, "upsample": q.Resize}),
    "dropout": (lambda s, a, b: F.dropout(a, 0.5, s.training), {"dropout": nn.Dropout}),
    "dropout2d": (lambda s, a, b: F.dropout2d(a, 0.5, training=s.training), {"dropout": nn.Dropout2d}),
}  # fmt: skip

LEFT: dict[str, Callable[..., Any]] = {
    "scalar": lambda s, a, b: a + 1,
    "reflected scalar": lambda s, a, b: 1 + a * 2,
    "parameter": lambda s, a, b: a * s.scale,
    "buffer": lambda s, a, b: a + s.shift,
    "two parameters": lambda s, a, b: a - (s.scale + s.scale),
    "alpha": lambda s, a, b: torch.add(a, b, alpha=2),
    "cat of the batch": lambda s, a, b: torch.cat([a, b]),
    "cat with a parameter": lambda s, a, b: torch.cat([a[:1, :, :1, :1], s.scale[None]], 1),
    "whole batch sliced": lambda s, a, b: a[1:],
    "mean of channels": lambda s, a, b: a.mean(1),
    "mean of all": lambda s, a, b: a.mean(),
    "flatten all": lambda s, a, b: a.flatten(),
    "view of pairs": lambda s, a, b: a.view(-1, 2),
    "view by a number": lambda s, a, b: a.view(2, -1),
    "view by channels": lambda s, a, b: a.view(a.shape[1], -1),
    "view by another's batch": lambda s, a, b: a.view(b.transpose(0, 1).size(0), -1),
    "other view": lambda s, a, b: a.view(a.shape[0], 2, -1),
    "bilinear": lambda s, a, b: F.interpolate(a, scale_factor=2, mode="bilinear"),
    "reflection": lambda s, a, b: F.pad(a, (1, 1, 1, 1), mode="reflect"),
    "dropout in eval mode too": lambda s, a, b: F.dropout(a, 0.5, True),
    "sizes": lambda s, a, b: a * (a.shape[2] + b.shape[3]),
    "softmax": lambda s, a, b: a.softmax(1),
    "made tensor": lambda s, a, b: a * torch.arange(6.0),
    "powers": lambda s, a, b: 0.5 * torch.pow(a, 3.0) - torch.pow(2.0, b) - a**2,
    "integers": lambda s, a, b: (a.argmax(1) + b.argmax(1)) * a[:, 0],
}  # fmt: skip

X = torch.linspace(-3, 3, 2 * 3 * 36).sin().reshape(2, 3, 6, 6)


@pytest.mark.filterwarnings("ignore:.*F.sigmoid.*:UserWarning", "ignore:nn.functional.(sigmoid|tanh):UserWarning")
@pytest.mark.parametrize("function, modules", REPLACED.values(), ids=list(REPLACED))
def test_a_function_becomes_a_module(function, modules):
    model, plain, result = traced(Body(function), X)
    new = {name: m for name, m in model.named_children() if name not in ("first", "second")}
    assert {name: type(m) for name, m in new.items()} == modules
    assert [name.rpartition(".")[2] for name in result.modules] == list(modules)
    assert all(__file__ in what for what in result.modules.values())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_equal_runs(model, plain, X, torch.cat((X, X + 1, -X)))


@pytest.mark.parametrize("function", LEFT.values(), ids=list(LEFT))
def test_other_functions_stay(function):
    model, plain, result = traced(Body(function), X)
    assert not [n for n, m in model.named_modules() if n not in ("", "first", "second") and not isinstance(m, q.Slice)]
    if not result:
        assert type(model) is Body
    assert_equal_runs(model, plain, X)


def test_what_stays_a_function_is_named():
    _, _, result = traced(Body(lambda s, a, b: (a + b).softmax(1) * 3), X)
    assert result[0].left == ("softmax", "mul")
    assert "still functions: softmax, mul" in str(result)


def test_a_tensor_passes_for_one():
    """Questions for the type have the answer that they have outside, tensors in lists included."""

    def asks(s: Body, a: Any, b: Any) -> Any:
        a = [a] if isinstance(a, torch.Tensor) else a
        assert not isinstance(b, (list, nn.Parameter))
        assert torch.is_tensor(b)
        assert isinstance(s.scale, nn.Parameter)
        return torch.cat([*a, b], 1)

    model, plain, result = traced(Body(asks), X)
    assert list(result.modules) == ["cat"]
    assert isinstance is builtins.isinstance
    assert type(isinstance).__name__ == "builtin_function_or_method"
    assert_equal_runs(model, plain, X)


class OwnWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.matrix, self.bias = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.conv2d(x, self.kernel, None, 2, padding=1).mean((2, 3)), self.matrix, self.bias)


def test_layers_by_function():
    """The parameters move and stay the same objects, under their old attributes too; old checkpoints load."""
    model = OwnWeights()
    parameters = dict(model.named_parameters())
    model, plain, result = traced(model, X)
    assert type(model.conv) is nn.Conv2d
    assert type(model.linear) is nn.Linear
    assert model.conv.weight is parameters["kernel"] is model.kernel
    assert model.linear.bias is parameters["bias"]
    renamed = (("kernel", "conv.weight"), ("matrix", "linear.weight"), ("bias", "linear.bias"))
    assert result.renamed == renamed
    assert "key 'kernel' is now 'conv.weight'" in str(result)
    assert list(model.state_dict()) == [new for _, new in renamed]
    other = OwnWeights()
    model.load_state_dict(other.state_dict(), strict=True)
    outer = nn.Sequential(model)
    outer.load_state_dict(nn.Sequential(other).state_dict(), strict=True)
    assert torch.equal(outer(X), other(X))
    outer.load_state_dict(outer.state_dict())
    assert all(torch.equal(p, plain.get_parameter(n)) is False for n, p in (("kernel", model.kernel),))
    lsquant.prepare(model, lsquant.Recipe(4, 4), X)
    assert isinstance(model.conv, q.QuantizedLayer)
    assert isinstance(model.linear, q.QuantizedLayer)


def test_a_parameter_that_is_used_twice_stays():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(F.linear(F.linear(x, self.matrix), self.matrix))

    x = torch.randn(3, 4)
    model, plain, result = traced(Twice(), x)
    assert list(result.modules) == ["relu"]
    assert list(dict(model.named_parameters())) == ["matrix"]
    assert_equal_runs(model, plain, x)
