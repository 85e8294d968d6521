"""BatchNorm and average pooling of one and three dimensions: literal orders of float32 operations."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
import oracle
from helpers.engines import assert_same
from helpers.exact_layers import exact
from lsquant import Recipe
from lsquant.nn import EXACT_TYPES, ExactBatchNorm

F32 = np.float32

# ---- BatchNorm ----

NORMS = {
    "1d": (nn.BatchNorm1d, (6, 5)),
    "1d with length": (nn.BatchNorm1d, (4, 5, 7)),
    "3d": (nn.BatchNorm3d, (3, 5, 2, 3, 4)),
}
every_norm = pytest.mark.parametrize("name", NORMS)


def norm(name: str, **options: Any) -> tuple[Any, torch.Tensor]:
    make, shape = NORMS[name]
    layer = make(5, **options)
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.1, 3.0)
        if layer.weight is not None:
            layer.weight.normal_()
            layer.bias.normal_()
    return layer, torch.randn(shape)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}])
@every_norm
def test_batchnorm_in_eval_is_two_rounded_operations(name, options):
    layer, x = norm(name, **options)
    plain = layer.eval()(x)
    layer = exact(layer)
    assert isinstance(layer, ExactBatchNorm)
    alpha, beta = (t.detach() for t in layer.affine_constants())
    weight, bias = (t.detach().numpy() if t is not None else v for t, v in ((layer.weight, 1), (layer.bias, 0)))
    want = oracle.batchnorm_constants(weight, bias, layer.running_mean.numpy(), layer.running_var.numpy(), layer.eps)
    assert np.allclose(alpha.numpy(), want[0], rtol=1e-6, atol=0)
    assert np.allclose(beta.numpy(), want[1], rtol=1e-5, atol=1e-6)
    y = layer(x).detach()
    assert_same(y, torch.tensor(oracle.batchnorm_eval(x, alpha, beta)))
    assert torch.allclose(y, plain, rtol=1e-5, atol=1e-5)
    low = x.bfloat16()
    assert_same(layer(low).detach(), torch.tensor(oracle.batchnorm_eval(low.float(), alpha, beta)).bfloat16())
    assert layer(x[:0]).shape == (0, *x.shape[1:])
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(5))


@every_norm
def test_batchnorm_in_training_is_torchs(name):
    mine, x = norm(name)
    theirs = copy.deepcopy(mine)
    mine = exact(mine)
    for layer in (mine, theirs):
        layer(x).square().sum().backward()
    assert_same(mine.weight.grad, theirs.weight.grad)
    assert_same(mine.running_var, theirs.running_var)
    assert_same(mine(x), theirs(x))


@every_norm
def test_gradients_of_batchnorm_in_eval(name):
    mine, values = norm(name)
    theirs = copy.deepcopy(mine)
    x = [values.clone().requires_grad_(), values.clone().requires_grad_()]
    for layer, leaf in zip((exact(mine).eval(), theirs.eval()), x, strict=True):
        (layer(leaf) ** 2).sum().backward()
    assert torch.allclose(x[0].grad, x[1].grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(mine.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-3)


# ---- average pooling ----


def literal(x: torch.Tensor, windows: list[list[tuple[int, int]]], count: Any) -> torch.Tensor:
    """Boxes in float32: the first dimension is added up from left to right, then the next, then one division."""
    values, dims = x.numpy(), len(windows)
    result = np.zeros((*values.shape[:-dims], *map(len, windows)), F32)
    for place in np.ndindex(*map(len, windows)):
        box = tuple(windows[d][place[d]] for d in range(dims))
        block = values[(..., *(slice(*one) for one in box))]
        for _ in range(dims):
            axis = values.ndim - dims
            parts = np.moveaxis(block, axis, 0)
            total = parts[0]
            for part in parts[1:]:
                total = (total + part).astype(F32)
            block = np.expand_dims(total, -1)  # the next dimension moves to the place of this one
        result[(..., *place)] = block.reshape(block.shape[: values.ndim - dims]) / F32(count(box))
    return torch.tensor(result)


POOLS: dict[str, dict[str, Any]] = {
    "2": {"kernel_size": 2},
    "3, stride 1": {"kernel_size": 3, "stride": 1},
    "gaps": {"kernel_size": 2, "stride": 3},
    "padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "padding not counted": {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
}
SIZES = {1: (9,), 3: (6, 5, 7)}
MAKE = {1: (nn.AvgPool1d, nn.AdaptiveAvgPool1d), 3: (nn.AvgPool3d, nn.AdaptiveAvgPool3d)}
dimensions = pytest.mark.parametrize("dims", [1, 3])


@pytest.mark.parametrize("name", [*POOLS, "unequal", "divisor"])
@dimensions
def test_average_pooling(name, dims):
    options = {"unequal": {"kernel_size": (2, 3, 1), "stride": (1, 2, 3), "padding": (1, 0, 0)},
               "divisor": {"kernel_size": 3, "padding": 1, "divisor_override": 7}}.get(name) or POOLS[name]  # fmt: skip
    if dims == 1 and name in ("unequal", "divisor"):
        options = {"kernel_size": 4, "stride": 1, "padding": 2, "count_include_pad": False}
    x = torch.randn(2, 3, *SIZES[dims]) * 100
    layer = MAKE[dims][0](**options)
    wide = layer(x.double())
    layer = exact(layer).eval()
    assert type(layer) is EXACT_TYPES[MAKE[dims][0]]
    kernel, padding = (oracle.each(options.get(k, 0), dims) for k in ("kernel_size", "padding"))
    stride = oracle.each(options.get("stride", kernel), dims)
    padded = torch.tensor(np.pad(x.numpy(), ((0, 0), (0, 0), *((p, p) for p in padding))))
    windows = [
        [(i, i + k) for i in range(0, n - k + 1, s)] for n, k, s in zip(padded.shape[2:], kernel, stride, strict=True)
    ]

    def count(box: tuple[tuple[int, int], ...]) -> int:
        if "divisor_override" in options:
            return options["divisor_override"]
        inside = itertools.product(*(range(*one) for one in box))
        if options.get("count_include_pad", True):
            return len(list(inside))
        return sum(all(p <= i < p + n for i, p, n in zip(at, padding, SIZES[dims], strict=True)) for at in inside)

    y = layer(x)
    assert_same(y, literal(padded, windows, count))
    assert y.shape == wide.shape
    assert (y.double() - wide).abs().max() < 1e-4
    assert_same(layer(x[0]), y[0])
    assert_same(layer(x.bfloat16()), layer(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("size", [1, 2, 3, 5, (2, 4, None)])
@dimensions
def test_adaptive_average_pooling(size, dims):
    if isinstance(size, tuple) and dims == 1:
        size = (4,)
    x = torch.randn(2, 3, *SIZES[dims]) * 100
    layer = MAKE[dims][1](size)
    wide = layer(x.double())
    layer = exact(layer).eval()
    wanted = size if isinstance(size, tuple) else (size,) * dims
    windows = [
        [(int(np.floor(i * n / (m or n))), int(np.ceil((i + 1) * n / (m or n)))) for i in range(m or n)]
        for n, m in zip(SIZES[dims], wanted, strict=True)
    ]
    y = layer(x)
    assert_same(y, literal(x, windows, lambda box: int(np.prod([b - a for a, b in box]))))
    assert (y.double() - wide).abs().max() < 1e-4
    assert_same(layer(x[0]), y[0])


@pytest.mark.parametrize("kind", [0, 1])
@dimensions
def test_pooling_in_training_is_torchs_and_has_its_gradients(dims, kind):
    layer, x = MAKE[dims][kind](3), torch.randn(2, 3, *SIZES[dims]).requires_grad_()
    want = layer(x)
    (gradient,) = torch.autograd.grad((want**2).sum(), x)
    layer = exact(layer).train()
    assert_same(layer(x), want)
    assert_same(torch.autograd.grad((layer(x) ** 2).sum(), x)[0], gradient)
    y = layer.eval()(x)
    assert torch.allclose(torch.autograd.grad((y**2).sum(), x)[0], gradient, rtol=1e-4, atol=1e-5)


# ---- in a model ----


@pytest.mark.parametrize("layer", [nn.AvgPool1d(2, ceil_mode=True), nn.AvgPool3d(2, ceil_mode=True),
                                   nn.BatchNorm1d(3, track_running_stats=False)])  # fmt: skip
def test_what_has_no_exact_form_stays_as_it_is_and_says_so(layer):
    kind = type(layer)
    model = nn.Sequential(nn.Linear(2, 2), layer)
    changes = lsquant.prepare(model, Recipe(4, 4))
    assert type(model[1]) is kind
    assert "not bit-exact" in changes[-1].reason


@pytest.mark.parametrize("kind", EXACT_TYPES, ids=lambda kind: kind.__name__)
def test_revert_copies_and_names(kind):
    layer = kind(2)
    model = nn.Sequential(nn.Linear(2, 2), layer)
    keys = set(layer.state_dict())
    lsquant.prepare(model, Recipe(4, 4))
    assert type(layer) is EXACT_TYPES[kind]
    assert set(layer.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[1]) is EXACT_TYPES[kind]
    model.bfloat16().half().float()
    lsquant.prepare(model, Recipe(4, None))  # weights alone: nothing to be exact about
    assert type(layer) is kind
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.revert(model)
    assert type(layer) is kind
