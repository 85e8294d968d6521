"""g, R, initial steps and the guard, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

import oracle
from lsquant import reference


def close(value: float):
    return pytest.approx(value, rel=1e-6)


# ---------------------------------------------------------------------- g


@pytest.mark.parametrize(
    "count,q_max,g",
    [
        (1, 1, 1.0),
        (4, 1, 0.5),
        (100, 7, 0.03779644730092272),  # 1/sqrt(700)
        (4608, 1, 0.014731391274719739),  # 1/sqrt(4608): a 3x3 convolution of 16 x 32 channels at 2 bits
        (2359296, 127, 5.777060608177824e-05),  # 1/sqrt(299630592)
        (16384, 3, 0.004510548978043952),  # 1/sqrt(49152)
    ],
)
def test_gradient_scale(count: int, q_max: int, g: float) -> None:
    assert reference.gradient_scale(count, q_max) == close(g)
    assert oracle.gradient_scale(count, q_max) == close(g)


# ---------------------------------------------------------------------- the paper's initial step


def test_initial_step_of_a_tensor() -> None:
    w = torch.tensor([[0.5, -1.5], [2.0, -4.0]])  # mean |w| = 2
    step = reference.initial_step(w, 7)
    assert step.shape == (1,)
    assert step.dtype == torch.float32
    assert step.item() == close(1.5118578920369088)  # 4/sqrt(7)
    assert reference.initial_step(w, 1).item() == close(4.0)
    assert reference.initial_step(w, 127).item() == close(0.354942603766444)  # 4/sqrt(127)


def test_initial_step_per_axis_and_per_group() -> None:
    w = torch.tensor([[1.0, -1.0, 2.0, -4.0], [3.0, 5.0, -8.0, 0.0]])
    assert reference.initial_step(w, 1, axis=0).tolist() == [close(4.0), close(8.0)]
    assert reference.initial_step(w, 4, axis=0).tolist() == [close(2.0), close(4.0)]
    assert reference.initial_step(w, 1, axis=1).tolist() == [close(4.0), close(6.0), close(10.0), close(4.0)]
    assert reference.initial_step(w, 1, group_size=2).tolist() == [close(2.0), close(6.0), close(8.0), close(8.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_initial_step_against_the_oracle(dtype: torch.dtype) -> None:
    w = (torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.3).to(dtype)
    for layout in ({}, {"axis": 0}, {"axis": 1}, {"group_size": 9}):
        got = reference.initial_step(w, 7, **layout)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), oracle.initial_step(w.float().numpy(), 7, **layout), rtol=1e-6)


# ---------------------------------------------------------------------- R


def test_step_balance_by_hand() -> None:
    """||w|| = 5, ||dw|| = 1, s = 0.5, ds = -0.2: (0.2/0.5) / (1/5) = 2."""
    w, dw = torch.tensor([3.0, 4.0]), torch.tensor([-0.6, 0.8])
    assert reference.step_balance(w, dw, torch.tensor([0.5]), torch.tensor([-0.2])).tolist() == [close(2.0)]


def test_step_balance_of_every_step() -> None:
    w = torch.tensor([[3.0, 4.0, 0.0, 2.0], [1.0, 2.0, 2.0, 4.0]])
    dw = torch.tensor([[1.0, 0.0, 0.0, 4.0], [3.0, 0.0, 0.0, 4.0]])
    # rows: norms sqrt(29), 5; gradient norms sqrt(17), 5
    per_row = reference.step_balance(w, dw, torch.tensor([1.0, 2.0]), torch.tensor([1.0, -6.0]), axis=0)
    assert per_row.tolist() == [close(1.306094312422), close(3.0)]
    # pairs: norms 5, 2, sqrt(5), sqrt(20); gradient norms 1, 4, 3, 4
    steps, grads = torch.tensor([1.0, 1.0, 2.0, 0.5]), torch.tensor([2.0, 1.0, -3.0, 0.0])
    per_group = reference.step_balance(w, dw, steps, grads, group_size=2)
    assert per_group.tolist() == [close(10.0), close(0.5), close(1.118033988749895), 0.0]


def test_step_balance_against_the_oracle() -> None:
    g = torch.Generator().manual_seed(3)
    w, dw = torch.randn(6, 4, 3, generator=g), torch.randn(6, 4, 3, generator=g) * 1e-3
    for layout, n in (({}, 1), ({"axis": 0}, 6), ({"axis": 2}, 3), ({"group_size": 4}, 18)):
        s, ds = torch.rand(n, generator=g) + 0.1, torch.randn(n, generator=g)
        got = reference.step_balance(w, dw, s, ds, **layout)
        expected = oracle.step_balance(w.numpy(), dw.numpy(), s.numpy(), ds.numpy(), **layout)
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-6)


# ---------------------------------------------------------------------- the MSE step


def _samples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(1500)
    samples = {
        "normal": normal,
        "after ReLU": np.maximum(normal, 0),
        "mostly zeros": np.where(rng.random(1500) < 0.8, 0, np.abs(normal)),
        "uniform": rng.uniform(-1, 1, 1500),
        "heavy tail": rng.standard_t(2, 1500),
        "one outlier": np.append(normal, 1000.0),
        "shifted": normal + 3,
        "constant": np.full(40, 0.7),
        "two values": np.array([1.0, -0.3] * 20),
        "one value": np.array([2.5]),
        "negative only": -np.abs(normal),
        "tiny": normal * 1e-12,
        "huge": normal * 1e30,
        "grid": np.round(normal * 4) * 0.1,
    }
    return {name: v.astype(np.float32) for name, v in samples.items()}


SAMPLES = _samples()


@pytest.mark.parametrize("bits,signed", [(2, True), (2, False), (4, True), (4, False), (8, True)])
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_step(name: str, bits: int, signed: bool) -> None:
    v = SAMPLES[name]
    q_min, q_max = oracle.bounds(bits, signed)
    step = reference.mse_step(torch.tensor(v), q_min, q_max)
    assert step.shape == (1,)
    assert step.dtype == torch.float32
    best, at = oracle.best_squared_error(v, q_min, q_max)
    got = oracle.squared_error(v, step.item(), q_min, q_max)
    assert got <= 1.001 * best, f"error {got:g} with step {step.item():g}, best {best:g} with {at:g}"


@pytest.mark.parametrize("layout", [{"axis": 0}, {"axis": 1}, {"group_size": 50}])
def test_mse_step_of_every_step(layout: dict[str, int]) -> None:
    rng = np.random.default_rng(5)
    v = (rng.standard_normal((4, 100)) * np.exp(rng.standard_normal((4, 1)) * 3)).astype(np.float32)
    if layout.get("axis") == 1:
        v = np.ascontiguousarray(v.T)
    steps = reference.mse_step(torch.tensor(v), -2, 1, **layout)
    index = oracle.step_index(v.shape, **layout)
    assert steps.shape == (index.max() + 1,)
    for k, step in enumerate(steps.tolist()):
        mine = v[index == k]
        assert oracle.squared_error(mine, step, -2, 1) <= 1.001 * oracle.best_squared_error(mine, -2, 1)[0]


@pytest.mark.parametrize("values", [100_000, 300_000])
def test_mse_step_of_many_values(values: int) -> None:
    """Too many to keep them all in a summary. Every tenth of the 2,000 steps, then all of them around the best."""
    rng = np.random.default_rng(7)
    v = (np.maximum(rng.standard_normal(values), 0) * rng.choice([0.3, 1.0, 5.0], values)).astype(np.float32)
    step = reference.mse_step(torch.tensor(v), 0, 3).item()
    grid = np.geomspace(1e-4, 2.0, 2000) * float(v.max())
    coarse = [oracle.squared_error(v, s, 0, 3) for s in grid[::10]]
    at = 10 * int(np.argmin(coarse))
    best = min(oracle.squared_error(v, s, 0, 3) for s in grid[max(0, at - 10) : at + 11])
    assert oracle.squared_error(v, step, 0, 3) <= 1.001 * best


def test_mse_step_of_bfloat16() -> None:
    v = torch.tensor(SAMPLES["normal"]).bfloat16()
    step = reference.mse_step(v, -8, 7)
    assert step.dtype == torch.float32
    values = v.float().numpy()
    assert oracle.squared_error(values, step.item(), -8, 7) <= 1.001 * oracle.best_squared_error(values, -8, 7)[0]


# ---------------------------------------------------------------------- the guard


def test_guard_value_and_gradient() -> None:
    s0 = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.3, 0.3, 7.0])
    s_min = s0 * 2.0**-10
    step = torch.tensor([2.0**-10, 2.0**-11, -5.0, 0.0, 1e-4, 0.1, 1e9])
    step[5] = torch.nextafter(s_min[5], torch.tensor(math.inf))  # the smallest step that is left alone
    step.requires_grad_()
    got = reference.guard(step, s0)
    expected = [2.0**-10, 2.0**-10, 2.0**-10, 2.0**-10, s_min[4].item(), step[5].item(), 1e9]
    assert got.tolist() == expected
    assert got.tolist() == oracle.guard(step.detach().numpy(), s0.numpy()).tolist()
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert torch.autograd.grad(got, step, upstream)[0].tolist() == upstream.tolist()  # gradient 1 everywhere


def test_guard_is_exact_where_a_detach_trick_is_not() -> None:
    """s + (s_eff - s).detach() loses bits; the value must be s_eff itself."""
    g = torch.Generator().manual_seed(0)
    s0 = torch.rand(1000, generator=g) * 1e-3 + 1e-6
    step = -torch.rand(1000, generator=g) * 10
    assert (step + (2.0**-10 * s0 - step) != 2.0**-10 * s0).any()
    assert torch.equal(reference.guard(step, s0), 2.0**-10 * s0)


def test_guard_lets_bad_steps_through() -> None:
    got = reference.guard(torch.tensor([math.nan, math.inf]), torch.ones(2))
    assert math.isnan(got[0].item())
    assert got[1].item() == math.inf


def test_guard_factor() -> None:
    assert reference.GUARD_FACTOR == 2.0**-10
