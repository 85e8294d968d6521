"""The oracle itself, against numbers by hand, scalar loops and float64 PyTorch: a wrong judge helps nobody."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import oracle


def test_it_imports_nothing_of_the_package() -> None:
    tree = ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"numpy", "math", "typing"}


def test_step_index() -> None:
    assert oracle.step_index((2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert oracle.step_index((2, 3), axis=0).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert oracle.step_index((2, 3), axis=1).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert oracle.step_index((2, 2, 2), group_size=2).tolist() == [[[0, 0], [1, 1]], [[2, 2], [3, 3]]]


def _one_element(v: float, s: float, q_min: int, q_max: int, z: int) -> tuple[int, np.float32, bool, float]:
    """(code, value, inside, step term) by scalar arithmetic with Python's own half-to-even `round`."""
    q = float(np.float32(v) / np.float32(s))
    code = min(max(round(q) + z, q_min), q_max)
    if q <= q_min - z:
        return code, np.float32(code - z) * np.float32(s), False, q_min - z
    if q >= q_max - z:
        return code, np.float32(code - z) * np.float32(s), False, q_max - z
    return code, np.float32(code - z) * np.float32(s), True, round(q) - q


@pytest.mark.parametrize("q_min,q_max,z", [(-8, 7, 0), (0, 3, 2), (-127, 127, -5), (0, 255, 255)])
def test_against_scalar_loops(q_min: int, q_max: int, z: int) -> None:
    rng = np.random.default_rng(0)
    steps = rng.uniform(0.01, 1, 5).astype(np.float32)
    quotients = rng.integers(2 * (q_min - z) - 4, 2 * (q_max - z) + 5, (5, 60)) / 2
    v = (quotients * steps[:, None] + rng.choice([0, 1e-3], (5, 60))).astype(np.float32)
    upstream = rng.standard_normal((5, 60)).astype(np.float32)
    arguments = (v, steps, q_min, q_max)
    code, value = oracle.codes(*arguments, z, axis=0), oracle.fake_quantize(*arguments, z, axis=0)
    gradient = oracle.element_gradient(upstream, *arguments, z, axis=0)
    of_step, magnitude = oracle.step_gradient(upstream, *arguments, 0.5, z, axis=0)
    of_offset, _ = oracle.offset_gradient(upstream, *arguments, 0.5, z, axis=0)
    for i in range(5):
        terms, outside = [], []
        for j in range(60):
            c, v_hat, inside, term = _one_element(v[i, j], steps[i], q_min, q_max, z)
            assert (code[i, j], value[i, j]) == (c, v_hat)
            assert gradient[i, j] == (upstream[i, j] if inside else 0)
            terms.append(term * float(upstream[i, j]))
            outside.append(0.0 if inside else float(upstream[i, j]))
        assert of_step[i] == pytest.approx(0.5 * math.fsum(terms), rel=1e-12, abs=1e-12)
        assert magnitude[i] == pytest.approx(0.5 * math.fsum(map(abs, terms)), rel=1e-12)
        assert of_offset[i] == pytest.approx(0.5 * math.fsum(outside), rel=1e-12, abs=1e-12)


def test_lsq_plus_zero_point() -> None:
    z = oracle.lsq_plus_zero_point([-2.5, -3.5, 0.4, -99.0, math.nan], [1.0] * 5, 0, 15)
    assert z[:4].tolist() == [2, 4, 0, 15]
    assert math.isnan(z[4])


@pytest.mark.parametrize(
    "stride,padding,dilation,groups",
    [(1, 0, 1, 1), (2, 1, 1, 1), ((2, 1), (1, 2), (1, 2), 2), (1, "same", 1, 1), (1, "same", (2, 1), 4), (3, 2, 2, 4)],
)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
@pytest.mark.parametrize("z", [0, 7])
def test_conv2d_against_float64(stride, padding, dilation, groups, kernel, z) -> None:
    rng = np.random.default_rng(1)
    q_x, q_w = rng.integers(0, 16, (2, 4, 9, 11)), rng.integers(-8, 8, (8, 4 // groups, *kernel))
    s_x, s_w = np.float32(0.013), rng.uniform(0.01, 0.1, 8).astype(np.float32)
    bias = rng.standard_normal(8).astype(np.float32)
    got = oracle.conv2d(q_x, z, s_x, q_w, s_w, bias, stride, padding, dilation, groups)
    x, w = torch.tensor(q_x).double() - z, torch.tensor(q_w).double()
    if padding == "same":
        (top, bottom), (left, right) = oracle.same_padding(kernel, dilation)
        explicit = F.conv2d(F.pad(x, (left, right, top, bottom)), w, None, stride, 0, dilation, groups)
        acc = F.conv2d(x, w, None, stride, "same", dilation, groups) if kernel == (3, 3) else explicit
        assert torch.equal(acc, explicit)
    else:
        acc = F.conv2d(x, w, None, stride, padding, dilation, groups)
    expected = acc.float() * torch.tensor(s_x * s_w)[:, None, None] + torch.tensor(bias)[:, None, None]
    assert got.dtype == np.float32
    assert torch.equal(torch.tensor(got), expected)


def test_linear_by_hand() -> None:
    got = oracle.linear([[1, 2, 3], [4, 5, 6]], 1, 0.5, [[1, 0, -1], [2, 2, 2]], [0.25, 1.0], [1.0, -1.0])
    assert got.tolist() == [[0.75, 2.0], [0.75, 11.0]]
    grouped = oracle.linear_groups(
        [[1, 2, 3, 4]], 0, 0.5, [[1, 1, 1, 1], [1, 0, 0, 1]], [1.0, 2.0, 4.0, 8.0], 2, [1.0, 1.0]
    )
    assert grouped.tolist() == [[1.5 + 7 + 1, 2 + 16 + 1]]


def test_a_nan_code_poisons_what_it_feeds_and_nothing_else() -> None:
    q_x = np.ones((1, 1, 5, 5))
    q_x[0, 0, 0, 0] = np.nan
    y = oracle.conv2d(q_x, 0, 1.0, np.zeros((1, 1, 3, 3)), [1.0], padding=1)
    assert np.isnan(y[0, 0]).nonzero()[0].tolist() == [0, 0, 1, 1]
    assert np.isnan(oracle.linear([[1, np.nan], [1, 1]], 0, 1.0, [[1, 1]], [1.0])).tolist() == [[True], [False]]


def test_batchnorm() -> None:
    rng = np.random.default_rng(2)
    bn = torch.nn.BatchNorm2d(3).double().eval()
    with torch.no_grad():
        for t in (bn.weight, bn.bias, bn.running_mean):
            t.copy_(torch.tensor(rng.standard_normal(3)))  # type: ignore[union-attr]
    x = torch.tensor(rng.standard_normal((2, 3, 4, 4)))
    assert bn.running_mean is not None
    assert bn.running_var is not None
    weight, bias, mean, var = (t.detach().numpy() for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
    alpha, beta = oracle.batchnorm_constants(weight, bias, mean, var, bn.eps)
    np.testing.assert_allclose(
        oracle.batchnorm_eval(x.numpy(), alpha, beta), bn(x).detach().numpy(), rtol=1e-4, atol=1e-6
    )
    assert (
        oracle.batchnorm_eval(np.array([[1 + 2**-23]], np.float32), [1 + 2**-23], [-1.0]).item() == 2.0**-22
    )  # rounded twice


def test_best_squared_error() -> None:
    best, step = oracle.best_squared_error(np.array([1.0, -1.0, 1.0]), -2, 1)
    assert step == pytest.approx(1.0, rel=3e-3)
    assert 0 <= best < 1e-4
