"""Properties that hold for every input, searched by hypothesis. Values and quotients are normal numbers or zero."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from helpers.engines import ENGINES
from lsquant import reference

engines = pytest.mark.parametrize("engine", ENGINES)

# |v| in [2^-60, 2^60] or 0, s in [2^-30, 2^30], k in [2^-20, 2^20]: no product and no quotient leaves the normal range
magnitudes = st.floats(2.0**-60, 2.0**60, width=32)
steps = st.floats(2.0**-30, 2.0**30, width=32)


@st.composite
def problems(draw) -> tuple[Tensor, Tensor, int, int, dict]:
    """(x, step, q_min, q_max, extras): x is arbitrary, or near multiples and half multiples of the step."""
    bits = draw(st.integers(2, 8))
    q_min, q_max = reference.bounds(bits, *draw(st.sampled_from([(True, False), (True, True), (False, False)])))
    s = draw(steps)
    anything = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda v: -v))
    halves = st.integers(-(2 ** (bits + 1)), 2 ** (bits + 2)).map(lambda i: float(np.float32(i / 2) * np.float32(s)))
    ordinary = st.floats(-(2.0 ** (bits + 1)), 2.0 ** (bits + 1), width=16).map(
        lambda q: float(np.float32(q) * np.float32(s))
    )
    values = draw(st.lists(st.one_of(anything, halves, ordinary), min_size=1, max_size=40))
    extras: dict = {}
    kind = draw(st.sampled_from(["none", "zero point", "offset"]))
    if kind == "zero point":
        extras["zero_point"] = draw(st.integers(q_min, q_max))
    elif kind == "offset":
        b = np.float32(-draw(st.floats(q_min - 2.0, q_max + 2.0, width=32).filter(lambda q: q == 0 or abs(q) > 1e-6)))
        extras["offset"] = torch.tensor([float(b * np.float32(s))])
    return torch.tensor(values), torch.tensor([s]), q_min, q_max, extras


def _run(engine: str, problem: tuple[Tensor, Tensor, int, int, dict]) -> Tensor:
    x, step, q_min, q_max, extras = problem
    return ENGINES[engine](x, step, q_min, q_max, 1.0, **extras)


@engines
@given(problem=problems())
@settings(max_examples=200, deadline=None)
def test_idempotent(engine: str, problem) -> None:
    once = _run(engine, problem)
    assert torch.equal(_run(engine, (once, *problem[1:])), once)


@engines
@given(problem=problems())
@settings(max_examples=200, deadline=None)
def test_monotone(engine: str, problem) -> None:
    x, *rest = problem
    x = x.sort().values
    assert bool((_run(engine, (x, *rest)).diff() >= 0).all())
    code = reference.codes(x, rest[0], rest[1], rest[2], **rest[3])
    assert bool((code.diff() >= 0).all())


@engines
@given(problem=problems())
@settings(max_examples=200, deadline=None)
def test_codes_are_integers_within_the_bounds_and_values_their_levels(engine: str, problem) -> None:
    x, step, q_min, q_max, extras = problem
    code = reference.codes(x, step, q_min, q_max, **extras)
    assert torch.equal(code, code.round())
    assert int(code.min()) >= q_min
    assert int(code.max()) <= q_max
    y = _run(engine, problem)
    # equal values where, and only where, the codes are equal: so at most q_max - q_min + 1 <= 2^b levels
    assert torch.equal(y[:, None] == y[None, :], code[:, None] == code[None, :])


@engines
@pytest.mark.parametrize("bits,signed,narrow,levels", [(2, True, True, 3), (2, False, False, 4), (8, True, False, 256)])
def test_a_dense_ramp_uses_every_level_and_no_more(
    engine: str, bits: int, signed: bool, narrow: bool, levels: int
) -> None:
    q_min, q_max = reference.bounds(bits, signed, narrow)
    x = torch.linspace(q_min - 3.0, q_max + 3.0, 20001) * 0.37
    assert _run(engine, (x, torch.tensor([0.37]), q_min, q_max, {})).unique().numel() == levels


@engines
@given(problem=problems(), exponent=st.integers(-20, 20))
@settings(max_examples=200, deadline=None)
def test_a_power_of_two_changes_no_code(engine: str, problem, exponent: int) -> None:
    x, step, q_min, q_max, extras = problem
    k = 2.0**exponent
    scaled = {name: value * k if name == "offset" else value for name, value in extras.items()}
    code = reference.codes(x, step, q_min, q_max, **extras)
    assert torch.equal(reference.codes(k * x, k * step, q_min, q_max, **scaled), code)
    assert torch.equal(_run(engine, (k * x, k * step, q_min, q_max, scaled)), k * _run(engine, problem))


@engines
@given(problem=problems())
@settings(max_examples=100, deadline=None)
def test_the_rounding_error_is_at_most_half_a_step_inside(engine: str, problem) -> None:
    x, step, *_ = problem
    x = x.requires_grad_()
    y = _run(engine, (x, *problem[1:]))
    (inside,) = torch.autograd.grad(y.sum(), x)
    error = (y.detach().double() - x.detach().double()).abs() / step.double()
    assert set(inside.unique().tolist()) <= {0.0, 1.0}
    assert bool((error[inside == 1] <= 0.5 + 1e-4).all())


@engines
@given(problem=problems())
@settings(max_examples=100, deadline=None)
def test_order_of_the_elements_does_not_matter(engine: str, problem) -> None:
    x, *rest = problem
    assert torch.equal(_run(engine, (x.flip(0), *rest)), _run(engine, problem).flip(0))
