"""BatchNorm and average pooling that runtimes can repeat: literal orders of float32 operations; torch in training."""

from __future__ import annotations

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
from lsquant.nn import ExactAdaptiveAvgPool2d, ExactAvgPool2d, ExactBatchNorm2d

F32 = np.float32




# ---- BatchNorm ----


def norm(**options: Any) -> Any:
    layer = nn.BatchNorm2d(5, **options)
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.1, 3.0)
        if layer.weight is not None:
            layer.weight.normal_()  # negative ones as well
            layer.bias.normal_()
    return layer


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}])
def test_batchnorm_in_eval_is_two_rounded_operations(options):
    layer, x = norm(**options), torch.randn(4, 5, 6, 6)
    plain = layer.eval()(x)
    layer = exact(layer)
    assert type(layer) is ExactBatchNorm2d
    alpha, beta = layer.affine_constants()
    assert alpha.dtype == beta.dtype == torch.float32
    assert alpha.shape == beta.shape == (5,)
    weight, bias = (t.detach().numpy() if t is not None else v for t, v in ((layer.weight, 1), (layer.bias, 0)))
    want = oracle.batchnorm_constants(weight, bias, layer.running_mean.numpy(), layer.running_var.numpy(), layer.eps)
    assert np.allclose(alpha.detach().numpy(), want[0], rtol=1e-6, atol=0)
    assert np.allclose(beta.detach().numpy(), want[1], rtol=1e-5, atol=1e-6)
    y = layer(x)
    assert_same(y.detach(), torch.tensor(oracle.batchnorm_eval(x, alpha.detach(), beta.detach())))
    assert torch.allclose(y, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 50_000])
def test_the_constants_of_batchnorm_are_rounded_correctly(channels):
    """As IEEE 754 has it, and so NumPy: torch.sqrt is not everywhere (0.7 % off on a Xeon with AVX-512)."""
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.running_var.uniform_(0.0, 10.0)
        for values in (layer.running_mean, layer.weight, layer.bias):
            values.normal_()
    mean, var, weight, bias = (
        t.detach().numpy() for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    alpha = weight / np.sqrt(var + F32(layer.eps))
    got = [constant.detach().numpy() for constant in exact(layer).affine_constants()]
    assert alpha.dtype == F32
    assert np.array_equal(got[0], alpha)
    assert np.array_equal(got[1], bias - mean * alpha)


def test_a_literal_batchnorm():
    """No fused multiply-add: the product is rounded, to a multiple of 2 here, before 1 is added."""
    layer = exact(nn.BatchNorm2d(1, eps=0.0)).eval()
    with torch.no_grad():
        layer.weight.fill_(4097.0)
        layer.bias.fill_(1.0)
    assert layer(torch.full((1, 1, 1, 1), 4097.0)).item() == 16785408.0  # 4097^2 = 16785409, to even; + 1, to even
    assert float(np.float64(4097) ** 2 + 1) == 16785410.0  # a float32: what a fused one gives


def test_batchnorm_in_training_is_torchs():
    mine, theirs, x = norm(), nn.BatchNorm2d(5), torch.randn(4, 5, 6, 6)
    theirs.load_state_dict(mine.state_dict())
    mine = exact(mine)
    for layer in (mine, theirs):
        layer(x).square().sum().backward()
    assert_same(mine.weight.grad, theirs.weight.grad)
    assert_same(mine.running_var, theirs.running_var)
    assert_same(mine(x), theirs(x))
    assert int(mine.num_batches_tracked) == 2


def test_gradients_of_batchnorm_in_eval():
    mine, theirs = norm(), nn.BatchNorm2d(5)
    theirs.load_state_dict(mine.state_dict())
    x = [torch.randn(4, 5, 6, 6).requires_grad_()]
    x.append(x[0].detach().clone().requires_grad_())
    for layer, values in zip((exact(mine).eval(), theirs.eval()), x, strict=True):
        (layer(values) ** 2).sum().backward()
    assert torch.allclose(x[0].grad, x[1].grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(mine.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-3)
    assert torch.allclose(mine.bias.grad, theirs.bias.grad, rtol=1e-4, atol=1e-3)


def test_batchnorm_types_layouts_and_refusals():
    layer = exact(norm()).eval()
    x = torch.randn(2, 5, 4, 4)
    alpha, beta = layer.affine_constants()
    assert_same(layer(x.bfloat16()), torch.tensor(oracle.batchnorm_eval(x.bfloat16().float(), alpha.detach(),
                beta.detach())).bfloat16())  # fmt: skip
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_same(last, layer(x))
    assert layer(x[:0]).shape == (0, 5, 4, 4)
    with pytest.raises(ValueError, match="expected 4D"):
        layer(x[0])


def test_batchnorm_without_statistics_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False))
    changes = lsquant.prepare(model, Recipe(4, 4))
    assert type(model[1]) is nn.BatchNorm2d
    assert "no running statistics" in changes[-1].reason


# ---- average pooling ----


def literal(x: torch.Tensor, rows: list[tuple[int, int]], columns: list[tuple[int, int]], count: Any) -> torch.Tensor:
    """Boxes in float32: rows are added top to bottom, then columns left to right, then one division.

    `count(row, column)`: the divisor of the box of these half-open ranges.
    """
    values = x.numpy()
    result = np.zeros((*values.shape[:-2], len(rows), len(columns)), F32)
    for index in np.ndindex(*values.shape[:-2]):
        for i, (top, bottom) in enumerate(rows):
            for j, (left, right) in enumerate(columns):
                sums = []
                for column in range(left, right):
                    total = values[(*index, top, column)]
                    for row in range(top + 1, bottom):
                        total = F32(total + values[(*index, row, column)])
                    sums.append(total)
                total = sums[0]
                for one in sums[1:]:
                    total = F32(total + one)
                result[(*index, i, j)] = F32(total / F32(count((top, bottom), (left, right))))
    return torch.tensor(result)


POOLS: dict[str, dict[str, Any]] = {
    "2": {"kernel_size": 2},
    "3, stride 1": {"kernel_size": 3, "stride": 1},
    "overlapping": {"kernel_size": (3, 2), "stride": (2, 1)},
    "gaps": {"kernel_size": 2, "stride": 3},
    "padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "padding not counted": {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    "unequal padding not counted": {"kernel_size": (2, 5), "stride": 1, "padding": (0, 2), "count_include_pad": False},
    "divisor": {"kernel_size": 2, "divisor_override": 3},
    "divisor and padding": {"kernel_size": 3, "padding": 1, "divisor_override": 7, "count_include_pad": False},
    "everything": {"kernel_size": (7, 6)},
}


@pytest.mark.parametrize("name", POOLS)
def test_average_pooling(name):
    options, x = POOLS[name], torch.randn(2, 3, 7, 6) * 100
    layer = nn.AvgPool2d(**options)
    plain, wide = layer(x), layer(x.double())
    layer = exact(layer).eval()
    assert type(layer) is ExactAvgPool2d
    kernel, padding = oracle.pair(options["kernel_size"]), oracle.pair(options.get("padding", 0))
    stride = oracle.pair(options.get("stride", kernel))
    padded = torch.tensor(np.pad(x.numpy(), ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2)))
    starts = [range(0, padded.shape[2 + d] - kernel[d] + 1, stride[d]) for d in range(2)]
    rows, columns = ([(i, i + kernel[d]) for i in starts[d]] for d in range(2))

    def count(row: tuple[int, int], column: tuple[int, int]) -> int:
        if "divisor_override" in options:
            return options["divisor_override"]
        if options.get("count_include_pad", True):
            return kernel[0] * kernel[1]
        inside = [
            len(set(range(*window)) & set(range(p, p + size)))
            for window, p, size in zip((row, column), padding, x.shape[2:], strict=True)
        ]
        return inside[0] * inside[1]

    y = layer(x)
    assert_same(y, literal(padded, rows, columns, count))
    assert y.shape == plain.shape
    assert (y.double() - wide).abs().max() < 1e-4
    assert_same(layer(x[0]), y[0])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, (2, 4), (None, 1), (8, 7), (9, 3)])
def test_adaptive_average_pooling(size):
    x = torch.randn(2, 3, 8, 7) * 100
    layer = nn.AdaptiveAvgPool2d(size)
    wide = layer(x.double())
    layer = exact(layer).eval()
    assert type(layer) is ExactAdaptiveAvgPool2d
    wanted = [
        n if n is not None else x.shape[2 + d] for d, n in enumerate(size if isinstance(size, tuple) else (size, size))
    ]
    rows, columns = (
        [(int(np.floor(i * full / n)), int(np.ceil((i + 1) * full / n))) for i in range(n)]
        for full, n in zip(x.shape[2:], wanted, strict=True)
    )
    y = layer(x)
    assert_same(y, literal(x, rows, columns, lambda r, c: (r[1] - r[0]) * (c[1] - c[0])))
    assert (y.double() - wide).abs().max() < 1e-4
    assert_same(layer(x[0]), y[0])


@pytest.mark.parametrize("size", [2, (1, 4), (5, 3), (3, None)])
def test_adaptive_average_pooling_to_more_than_there_is(size):
    """Neighbouring windows may be one; found by the fuzzer."""
    x = torch.randint(-50, 50, (2, 3, 1, 3)).float()
    layer = exact(nn.AdaptiveAvgPool2d(size)).eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.adaptive_avg_pool2d(x, size), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.AvgPool2d(3, padding=1), nn.AdaptiveAvgPool2d(3)])
def test_pooling_in_training_is_torchs_and_has_its_gradients(layer):
    x = torch.randn(2, 3, 7, 7).requires_grad_()
    want = layer(x)
    (want**2).sum().backward()
    gradient = x.grad.clone()
    layer, x.grad = exact(layer).train(), None
    y = layer(x)
    (y**2).sum().backward()
    assert_same(y, want)
    assert_same(x.grad, gradient)
    x.grad = None
    y = layer.eval()(x)
    (y**2).sum().backward()
    assert torch.allclose(x.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)])
def test_pooling_of_other_types_and_empty_batches(layer):
    layer, x = exact(layer).eval(), torch.randn(2, 3, 4, 4)
    low = x.bfloat16()
    assert_same(layer(low), layer(low.float()).bfloat16())
    assert layer(x[:0]).shape == (0, 3, 2, 2)
    assert_same(layer(x.to(memory_format=torch.channels_last)).contiguous(), layer(x))


def test_ceil_mode_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AvgPool2d(2, ceil_mode=True))
    changes = lsquant.prepare(model, Recipe(4, 4))
    assert type(model[1]) is nn.AvgPool2d
    assert "ceil_mode" in changes[-1].reason
