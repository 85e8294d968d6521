"""Average pooling takes every form of its arguments that torch's takes, and raises where torch's raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from lsquant import Recipe
from lsquant.nn.exact import ExactLayer

TAKEN = {
    "AdaptiveAvgPool1d": ([[3]], [(3,)], [3]),
    "AdaptiveAvgPool2d": ([[1, 1]], [(2, None)], [[None, 3]], [2]),
    "AdaptiveAvgPool3d": ([[1, 2, 3]], [(2, None, 1)], [2]),
    "AvgPool1d": ([[2]], [(3,), [2], [1]], [2, (1,), 1], [3, None]),
    "AvgPool2d": ([(2,)], [[2], [1]], [2, [1]], [(3, 2), (1,), (1,)], [3, (), 1], [2, None, [1]]),
    "AvgPool3d": ([(2,)], [[2, 1, 2], [1]], [(2,), (2,), (1,)]),
}


def prepared(pool: nn.Module, dims: int) -> nn.Module:
    """With a quantized layer before it, so that pooling is exchanged."""
    convolution = getattr(nn, f"Conv{dims}d")
    model = nn.Sequential(convolution(1, 1, 1), pool)
    lsquant.prepare(model, Recipe(4, 4))
    assert isinstance(model[1], ExactLayer)
    return model[1].eval()


@pytest.mark.parametrize("name, arguments", [(name, a) for name, all_ in TAKEN.items() for a in all_], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arguments_that_torch_takes(name: str, arguments: list[Any], dtype: torch.dtype) -> None:
    dims = int(name[-2])
    for shape in ((2, 3, *(6,) * dims), (3, *(5,) * dims)):
        x = torch.rand(shape, dtype=dtype)
        theirs = getattr(nn, name)(*arguments).eval()
        mine = prepared(getattr(nn, name)(*arguments), dims)
        expected = theirs(x)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-15
        for found in (mine(x), mine.train()(x.clone().requires_grad_()).detach()):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "name, arguments, shape",
    [
        ("AvgPool2d", [7], (1, 2, 4, 4)),  # no box at all
        ("AvgPool2d", [2, 2, 2], (1, 2, 4, 4)),  # padded by more than half of the kernel
        ("AvgPool2d", [(2, 2, 2)], (1, 2, 4, 4)),
        ("AvgPool2d", [2], (4, 4)),
        ("AvgPool2d", [2, 0], (1, 2, 4, 4)),
        ("AvgPool1d", [2], (4,)),
        ("AdaptiveAvgPool2d", [[2]], (1, 2, 4, 4)),
        ("AdaptiveAvgPool2d", [(2, 2, 2)], (1, 2, 4, 4)),
        ("AdaptiveAvgPool2d", [2], (4, 4)),
        ("AdaptiveAvgPool2d", [None], (1, 2, 4, 4)),
        ("AdaptiveAvgPool2d", [2], (1, 2, 0, 4)),
        ("AvgPool2d", [2, 2, 0, False, True, 0], (1, 2, 4, 4)),
    ],
)
def test_arguments_that_torch_refuses(name: str, arguments: list[Any], shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        getattr(nn, name)(*arguments).eval()(x)
    with pytest.raises(type(theirs.value)) as mine:
        prepared(getattr(nn, name)(*arguments), 2 if "2d" in name else 1)(x)
    assert str(mine.value) == str(theirs.value)


def test_integers_are_refused_as_by_torch() -> None:
    x = torch.ones(1, 2, 4, 4, dtype=torch.int64)
    results = []
    for pool in (nn.AvgPool2d(2).eval(), prepared(nn.AvgPool2d(2), 2)):
        try:
            results.append(pool(x).tolist())
        except RuntimeError as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_an_own_divisor() -> None:
    x = torch.rand(1, 2, 4, 4)
    pool = prepared(nn.AvgPool2d(2, divisor_override=3), 2)
    torch.testing.assert_close(pool(x), x.unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2)) / 3)


@pytest.mark.parametrize("kernel", [2, [2], (2,), (2, 2)], ids=str)
@pytest.mark.parametrize("stride", [None, 2, [2], ()], ids=str)
def test_the_order_of_additions(kernel: Any, stride: Any) -> None:
    """Rows first, then columns, then one division, in float32, whatever way the sizes are written."""
    x = torch.randn(4, 3, 8, 8)
    rows = x[..., 0::2, :] + x[..., 1::2, :]
    expected = (rows[..., 0::2] + rows[..., 1::2]) / 4
    assert not torch.equal(nn.functional.avg_pool2d(x, 2), expected)
    assert torch.equal(prepared(nn.AvgPool2d(kernel, stride), 2)(x), expected)
    assert torch.equal(prepared(nn.AdaptiveAvgPool2d([4, 4]), 2)(x), expected)  # type: ignore[arg-type]
