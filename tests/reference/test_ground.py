"""Every engine against the oracle: values, codes and gradients over the one table of cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import lsquant
import oracle
from helpers.cases import CASES, Built, Case, arrange, some
from helpers.engines import BOUND, ENGINES, assert_same, assert_within, gradients, value
from lsquant import reference

engines = pytest.mark.parametrize("engine", ENGINES)
all_cases = pytest.mark.parametrize("case", CASES, ids=str)

BIT_WIDTHS = [
    (bits, signed, narrow) for bits in range(2, 9) for signed, narrow in ((True, False), (True, True), (False, False))
]


# ---------------------------------------------------------------------------------------------- the table


@all_cases
def test_codes(case: Case) -> None:
    b = case.build()
    got = reference.codes(b.x, b.step, b.q_min, b.q_max, **b.extras)
    assert_same(got, torch.tensor(b.expected_codes(), dtype=torch.float32))


@engines
@all_cases
def test_value(engine: str, case: Case) -> None:
    b = case.build()
    assert_same(value(engine, b), b.expected_value())


@engines
@all_cases
def test_gradients(engine: str, case: Case) -> None:
    b = case.build()
    of_x, of_step, of_offset = gradients(engine, b)
    assert_same(of_x, b.expected_element_gradient())
    assert_within(of_step, *b.expected_step_gradient())
    if case.offset:
        assert of_offset is not None
        assert_within(of_offset, *b.expected_offset_gradient())


def test_the_table_reaches_what_it_claims() -> None:
    """A table without elements inside, outside and exactly on the clip points would let wrong code pass."""
    inside, below, above, on, ties, overflow = 0, 0, 0, 0, 0, 0
    for case in CASES:
        b = case.build()
        with np.errstate(all="ignore"):
            q = oracle.quotient(*b.oracle_arguments()[:2], **b.layout).astype(np.float64)
        z = oracle.spread(b.z, q.shape, **b.layout)
        inside += int(((q > b.q_min - z) & (q < b.q_max - z)).sum())
        below, above = below + int((q < b.q_min - z).sum()), above + int((q > b.q_max - z).sum())
        on += int(((q == b.q_min - z) | (q == b.q_max - z)).sum())
        overflow += int(np.isinf(q).sum())
        finite = np.where(np.isinf(q), 0, q)
        ties += int((np.abs(finite - np.floor(finite)) == 0.5).sum())
    assert min(inside, below, above, on, ties, overflow) > 300, (inside, below, above, on, ties, overflow)


# ---------------------------------------------------------------------------------------------- literal: no oracle


@engines
@pytest.mark.parametrize("bits,signed,narrow", BIT_WIDTHS)
@pytest.mark.parametrize("s", [0.25, 1.0, 0.1, 0.0123456, 3.7, 1234.5])
def test_every_integer_goes_in_and_comes_out(engine: str, bits: int, signed: bool, narrow: bool, s: float) -> None:
    q_min, q_max = reference.bounds(bits, signed, narrow)
    assert q_max - q_min == 2**bits - 1 - narrow
    step = torch.tensor([s])
    for z in {0, q_min, q_max, (q_min + q_max) // 2}:
        k = torch.arange(q_min - 5, q_max + 6)  # the integer before the zero point is added
        x = k.float() * step
        expected = (k + z).clamp(q_min, q_max)
        assert_same(reference.codes(x, step, q_min, q_max, zero_point=z), expected.float())
        got = ENGINES[engine](x, step, q_min, q_max, 1.0, zero_point=z)
        assert_same(got, (expected - z).float() * step)
        assert torch.equal(torch.round(got.double() / step.double()).long() + z, expected)


@engines
@pytest.mark.parametrize("bits,signed,narrow", BIT_WIDTHS)
@pytest.mark.parametrize("s", [1.0, 0.125, 64.0, 2.0**-30])
def test_ties_go_to_the_even_integer(engine: str, bits: int, signed: bool, narrow: bool, s: float) -> None:
    q_min, q_max = reference.bounds(bits, signed, narrow)
    k = torch.arange(q_min - 3, q_max + 3)
    x, step = (k.float() + 0.5) * s, torch.tensor([s])
    even = torch.where(k % 2 == 0, k, k + 1)
    assert_same(reference.codes(x, step, q_min, q_max), even.clamp(q_min, q_max).float())
    assert_same(ENGINES[engine](x, step, q_min, q_max, 1.0), even.clamp(q_min, q_max).float() * s)


@engines
def test_a_staircase_by_hand(engine: str) -> None:
    """s = 1, 3 bits signed: values, element gradients and step gradients written down from the paper."""
    v = [-9.0, -4.0, -3.75, -1.5, -0.5, 0.0, 0.5, 1.25, 1.49, 1.51, 2.5, 2.75, 3.0, 3.25]
    v_hat = [-4.0, -4.0, -4.0, -2.0, 0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    d_v = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    d_s = [-4.0, -4.0, -0.25, -0.5, 0.5, 0.0, -0.5, -0.25, -0.49, 0.49, -0.5, 0.25, 3.0, 3.0]
    x = torch.tensor(v, requires_grad=True)
    for i in range(len(v)):
        step = torch.ones(1, requires_grad=True)
        y = ENGINES[engine](x, step, -4, 3, 0.5)
        assert y.tolist() == v_hat
        of_x, of_step = torch.autograd.grad(y[i], (x, step))
        assert of_x.tolist() == [d_v[i] if j == i else 0.0 for j in range(len(v))]
        assert of_step.item() == pytest.approx(0.5 * d_s[i], abs=1e-6)  # 0.5 is g


@engines
def test_the_inside_test_is_on_the_raw_quotient(engine: str) -> None:
    """v/s = 6.75 rounds to the top code 7 and is inside; 7 exactly is outside."""
    x = torch.tensor([6.75, 7.0, -7.75, -8.0], requires_grad=True)
    ENGINES[engine](x, torch.ones(1), -8, 7, 1.0).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0, 1.0, 0.0]


@engines
def test_lsq_plus_by_hand(engine: str) -> None:
    """b = -2.6, s = 1, unsigned 2 bits: z = 3, levels -3 .. 0; outer step gradients q_min and q_max, not less z."""
    x = torch.tensor([-5.0, -3.0, -1.25, 0.0, 2.0], requires_grad=True)
    step, b = torch.ones(1, requires_grad=True), torch.tensor([-2.6], requires_grad=True)
    y = ENGINES[engine](x, step, 0, 3, 1.0, offset=b)
    assert y.tolist() == [-3.0, -3.0, -1.0, 0.0, 0.0]
    upstream = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    of_x, of_step, of_b = torch.autograd.grad(y, (x, step, b), upstream)
    assert of_x.tolist() == [0.0, 0.0, 100.0, 0.0, 0.0]
    assert of_step.item() == 0 * 11 + 0.25 * 100 + 3 * 11000
    assert of_b.item() == 11011.0


@engines
def test_the_zero_point_is_not_added_to_the_quotient(engine: str) -> None:
    """-0.49999997 + 255 is 254.5 in float32, a tie that rounds to another code: z is added after rounding."""
    z = 255
    x = torch.tensor([-0.3, -0.49999997, -254.99998], requires_grad=True)
    step = torch.ones(1, requires_grad=True)
    y = ENGINES[engine](x, step, 0, 255, 1.0, zero_point=z)
    assert y.tolist() == [0.0, 0.0, -255.0]
    of_x, of_step = torch.autograd.grad(y, (x, step), torch.tensor([0.0, 1.0, 1.0]))
    assert of_x.tolist() == [0.0, 1.0, 1.0]
    assert of_step.item() == pytest.approx(0.49999997 - 1.525879e-05, abs=1e-9)


@engines
def test_division_is_a_division(engine: str) -> None:
    """A multiplication with 1/s would be wrong on some of these ties."""
    s = torch.arange(3, 4000, 2).float() * 1e-3
    x = (torch.arange(s.numel()) % 7 + 0.5) * s
    expected = oracle.codes(x.numpy(), s.numpy(), -8, 7, axis=0)
    wrong = np.clip(np.rint(x.numpy() * (np.float32(1) / s.numpy())), -8, 7)
    assert (expected != wrong).any()
    assert_same(reference.codes(x, s, -8, 7, axis=0), torch.tensor(expected, dtype=torch.float32))
    assert_same(ENGINES[engine](x, s, -8, 7, 1.0, axis=0), torch.tensor(expected, dtype=torch.float32) * s)


# ---------------------------------------------------------------------------------------------- the step gradient


@engines
@pytest.mark.parametrize("term", ["inside", "above"])
def test_step_gradient_of_many_equal_terms(engine: str, term: str) -> None:
    """Two million equal terms: a plain float32 running sum would be off by percents."""
    n = 2**21
    x = torch.full((n,), 0.3 if term == "inside" else 50.0)
    b = Case("many", shape=(n,), bits=4).build()
    b = replace(b, x=x, step=torch.ones(1), upstream=torch.full((n,), 0.1), g=1.0)
    expected, magnitude = b.expected_step_gradient()
    assert_within(gradients(engine, b)[1], expected, magnitude)
    running = float(np.cumsum(np.full(n, np.float32(expected[0] / n), np.float32), dtype=np.float32)[-1])
    assert abs(running - expected[0]) > BOUND * magnitude[0], "this input would not catch a running sum"


@engines
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
def test_any_layout_of_the_upstream_gradient(engine: str, layout: str) -> None:
    for case in some("s4-normal", "axis1-ties", "group-normal", "z-tensor-s4-axis", "bfloat16-channels-last"):
        b = case.build()
        b = replace(b, upstream=arrange(b.upstream, layout))
        of_x, of_step, _ = gradients(engine, b)
        assert_same(of_x, b.expected_element_gradient())
        assert_within(of_step, *b.expected_step_gradient())


@engines
def test_upstream_of_a_plain_sum(engine: str) -> None:
    """`y.sum().backward()` sends an expanded scalar back."""
    for case in some("s4-normal", "axis0-normal", "group-normal", "channels_last-axis1", "z-offset-u4"):
        b = case.build()
        of_x, of_step, of_offset = gradients(engine, b, torch.ones(()).expand(case.shape))
        b = replace(b, upstream=torch.ones(case.shape))
        assert_same(of_x, b.expected_element_gradient())
        assert_within(of_step, *b.expected_step_gradient())
        if of_offset is not None:
            assert_within(of_offset, *b.expected_offset_gradient())


@engines
@pytest.mark.parametrize("name", ["s4-normal", "axis0-normal", "group-normal"])
def test_only_the_gradients_that_are_wanted(engine: str, name: str) -> None:
    b = some(name)[0].build()
    step, x = b.step.clone().requires_grad_(), b.x.clone().requires_grad_()
    both = gradients(engine, b)
    y = ENGINES[engine](b.x, step, b.q_min, b.q_max, b.g, **b.extras)
    assert_same(torch.autograd.grad(y, step, b.upstream)[0], both[1])
    y = ENGINES[engine](x, b.step, b.q_min, b.q_max, b.g, **b.extras)
    assert_same(torch.autograd.grad(y, x, b.upstream)[0], both[0])
    assert not value(engine, b).requires_grad


# ---------------------------------------------------------------------------------------------- failure


NAN, INF = math.nan, math.inf


def _poisoned(dtype: torch.dtype) -> Built:
    b = Case("poison", shape=(6, 8), bits=4, axis=0).build()
    x = b.x.clone()
    x[0, 1], x[1, 2], x[2, 3] = NAN, INF, -INF
    step = b.step.clone()
    step[3], step[4] = NAN, INF
    return replace(b, x=x.to(dtype), step=step, upstream=b.upstream.to(dtype))


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_becomes_nan_and_nothing_else_does(engine: str, dtype: torch.dtype) -> None:
    b = _poisoned(dtype)
    bad = torch.zeros(6, 8, dtype=torch.bool)
    bad[0, 1] = bad[1, 2] = bad[2, 3] = True
    bad[3:5] = True
    y = value(engine, b)
    assert torch.equal(y.isnan(), bad)
    assert_same(y, b.expected_value())
    code = reference.codes(b.x, b.step, b.q_min, b.q_max, **b.extras)
    assert_same(code, torch.tensor(b.expected_codes(), dtype=torch.float32))


@engines
def test_gradients_beside_what_is_not_finite(engine: str) -> None:
    b = _poisoned(torch.float32)
    of_x, of_step, _ = gradients(engine, b)
    assert_same(of_x, b.expected_element_gradient())
    for k in range(4):  # a NaN, an Inf, a -Inf, a NaN step: a loss scaler must see every one of them
        assert of_step[k].isnan()
    expected, magnitude = b.expected_step_gradient()
    assert abs(of_step[5].item() - expected[5]) <= BOUND * magnitude[5]


@engines
@pytest.mark.parametrize("step", [NAN, INF, -INF])
@pytest.mark.parametrize("how", ["plain", "zero_point", "offset"])
def test_a_bad_step_for_the_whole_tensor(engine: str, step: float, how: str) -> None:
    extras = {"plain": {}, "zero_point": {"zero_point": 5}, "offset": {"offset": torch.tensor([-1.0])}}[how]
    y = ENGINES[engine](torch.randn(50), torch.tensor([step]), 0, 15, 1.0, **extras)
    assert bool(y.isnan().all())


@engines
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_upstream_gradients_arrive(engine: str, bad: float) -> None:
    b = some("s4-normal")[0].build()
    upstream = b.upstream.clone()
    inside = oracle.inside(*b.oracle_arguments())
    at = tuple(np.argwhere(inside)[0].tolist())
    upstream[at] = bad
    of_x, of_step, _ = gradients(engine, b, upstream)
    assert not of_x[at].isfinite()
    assert int((~of_x.isfinite()).sum()) == 1
    assert not of_step.isfinite().all()


@engines
def test_a_quotient_that_overflows_clips(engine: str) -> None:
    x = torch.tensor([3e38, -3e38, 0.05], requires_grad=True)
    step = torch.tensor([1e-1], requires_grad=True)
    y = ENGINES[engine](x, step, -8, 7, 1.0)
    assert y.tolist() == [torch.tensor(7 * step.item()).item(), torch.tensor(-8 * step.item()).item(), 0.0]
    of_x, of_step = torch.autograd.grad(y, (x, step), torch.tensor([1.0, 1.0, 0.0]))
    assert of_x.tolist() == [0.0, 0.0, 0.0]
    assert of_step.item() == -1.0


# ---------------------------------------------------------------------------------------------- wrong use


WRONG = {
    "both zero points": {"step": 1, "zero_point": 1, "offset": torch.zeros(1)},
    "too many steps": {"step": 3},
    "steps not along the axis": {"step": 5, "axis": 0},
    "one step for an axis of four": {"step": 1, "axis": 0},
    "axis that is not there": {"step": 1, "axis": 2},
    "groups along another axis": {"step": 8, "axis": 1, "group_size": 3},
    "group that does not divide": {"step": 4, "group_size": 5},
    "group across two rows": {"step": 2, "group_size": 12},
    "wrong number of groups": {"step": 7, "group_size": 3},
    "group of nothing": {"step": 1, "group_size": 0},
    "wrong number of zero points": {"step": 4, "axis": 0, "zero_point": torch.zeros(3, dtype=torch.int32)},
    "wrong number of offsets": {"step": 4, "axis": 0, "offset": torch.zeros(3)},
}


@engines
@pytest.mark.parametrize("what", WRONG)
def test_wrong_use_is_an_error(engine: str, what: str) -> None:
    arguments = dict(WRONG[what])
    step = torch.ones(arguments.pop("step"))
    with pytest.raises((ValueError, IndexError)):
        ENGINES[engine](torch.randn(4, 6), step, -8, 7, 1.0, **arguments)


@engines
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_a_step_that_is_not_float32_is_an_error(engine: str, dtype: torch.dtype) -> None:
    with pytest.raises((ValueError, TypeError), match="float32"):
        ENGINES[engine](torch.randn(4, 6), torch.ones(1, dtype=dtype), -8, 7, 1.0)


@engines
def test_a_step_without_a_dimension_is_an_error(engine: str) -> None:
    with pytest.raises(ValueError, match=r"1-D|shape|dimension"):
        ENGINES[engine](torch.randn(4, 6), torch.tensor(1.0), -8, 7, 1.0)


def test_the_public_names_are_the_same_function() -> None:
    assert callable(lsquant.fake_quantize)
    assert lsquant.fake_quantize is not reference.fake_quantize
