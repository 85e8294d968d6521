"""Random calls: every engine gives the same values or the same error, the oracle's values and PyTorch's shapes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lsquant
from helpers.engines import assert_same
from helpers.random_calls import Call, drawn
from lsquant import LsquantError, kernels

needs_cpp = pytest.mark.skipif(bool(kernels.why_not("cpp")), reason="the C++ engine cannot be built here")
TESTS = Path(__file__).parents[1]
PER_TEST = 50
FINITE_SEEDS = 3
"""Of so many seeds one is differentiated."""
ORACLE_WEIGHTS = 1500
"""Convolutions with more are slow for the oracle's loops: it judges a tenth of them."""


def outcome(call: Call) -> Tensor | str:
    try:
        return call.run()
    except LsquantError as error:
        return f"{type(error).__name__}: {error}"


def float_outcome(call: Call) -> tuple[int, ...] | str:
    try:
        return call.float_shape()
    except RuntimeError as error:
        return f"ShapeError: {error}"


def check(seed: int) -> None:
    call = drawn(seed)
    with lsquant.use_engine("eager"):
        wanted = outcome(call)
    found = outcome(call)
    if isinstance(wanted, str) or isinstance(found, str):
        assert found == wanted
        if not call.spoiled:
            assert found == float_outcome(call)
        return
    assert not call.spoiled, f"nobody refuses: {call.spoiled}"
    assert_same(found, wanted)
    assert tuple(found.shape) == float_outcome(call)
    judged = call.conv is None or call.weight.numel() <= ORACLE_WEIGHTS or seed % 10 == 0
    if judged and found.numel() and call.weight.numel() + (call.kind == "quantizer"):
        assert_same(found, call.expected())
    if seed % FINITE_SEEDS == 0 and bool(call.x.isfinite().all()):
        for a, b in zip(gradients(call, None), gradients(call, "eager"), strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            loose = {torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(a.dtype, 2e-5)
            sums = 16.0 if a.dim() == 1 else 0.0  # of steps: terms of both signs, which cancel
            assert not a.numel() or (a - b).abs().max() <= loose * (b.abs().max() + sums)


def gradients(call: Call, engine: str | None) -> list[Tensor]:
    mine, leaves = call.with_leaves()
    if engine is None:
        y = mine.run()
        return list(torch.autograd.grad(y, leaves, upstream(y)))
    with lsquant.use_engine(engine):
        y = mine.run()
        return list(torch.autograd.grad(y, leaves, upstream(y)))


def upstream(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)


def check_all(first: int, count: int) -> None:
    for seed in range(first, first + count):
        try:
            check(seed)
        except BaseException as error:
            call = drawn(seed)
            error.add_note(f"seed {seed}: {call.kind} {tuple(call.x.shape)} {tuple(call.weight.shape)} {call.spoiled}")
            raise


@pytest.mark.parametrize("engine", ["cpp"])
@pytest.mark.parametrize("first", range(0, 300, PER_TEST))
def test_engines_agree_on_random_calls(first: int, engine: str) -> None:
    check_all(first, PER_TEST)


@pytest.mark.parametrize("engine", ["triton"])
def test_the_interpreted_triton_engine_agrees_on_random_calls(engine: str) -> None:
    check_all(300, 20)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpp"])
@pytest.mark.parametrize("first", range(1_000, 11_000, 500))
def test_engines_agree_on_many_random_calls(first: int, engine: str) -> None:
    check_all(first, 500)


# ---------------------------------------------------------------------------------------------- registered operators


def refusals(first: int, count: int) -> str:
    """What is printed by a process of its own, so that a crash is a red test."""
    command = [sys.executable, "-m", "helpers.raw_operators", str(first), str(count)]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def check_refusals(first: int, count: int) -> None:
    *others, counts = refusals(first, count).splitlines()
    assert not others
    assert re.fullmatch(r"\{'accepted': \d+, 'refused': (\d+), 'spoiled twice': \d+\}", counts)


def test_registered_operators_refuse_what_does_not_fit() -> None:
    check_refusals(0, 1_000)


@pytest.mark.slow
def test_registered_operators_refuse_what_does_not_fit_many() -> None:
    check_refusals(1_000, 20_000)


@needs_cpp
def test_memory_that_was_taken_away_is_refused() -> None:
    """As sharded parameters lose theirs: PyTorch's own operators would read it."""
    t = torch.randn(4, 8)
    t.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"x of shape \[4, 8\] reaches beyond its memory"):
        torch.ops.lsquant_cpp.fake_quantize(t, torch.ones(1), -8, 7, 1.0, None, None, 0, None, None)
    x, one = torch.randn(2, 8), torch.ones(1)
    with pytest.raises(RuntimeError, match=r"weight of shape \[4, 8\] reaches beyond its memory"):
        torch.ops.lsquant_cpp.linear(x, one, None, 0, 15, t, one, -8, 7, None)
