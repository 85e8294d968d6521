"""Quantizer: what it owns, how it is initialised, what it refuses, and its guard."""

import copy
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from helpers.engines import assert_same, assert_within
from helpers.quantizers import VARIETIES, data, ready, varieties
from lsquant import Quantizer, QuantSpec, quantizer

# ---------------------------------------------------------------------------------------------- what it owns


@varieties
def test_parameters_and_buffers(variety: str) -> None:
    q = ready(**VARIETIES[variety])
    steps = VARIETIES[variety].get("shape", (1,))
    assert [name for name, _ in q.named_parameters()] == ["step", "offset"][: 2 if variety == "offset" else 1]
    for t in (q.step, q.initial_step):
        assert t.shape == steps
        assert t.dtype == torch.float32
    assert set(q.state_dict()) == {"step", "initial_step", "signed", "count", "initialized", "bounds"} | (
        {"offset"} if variety == "offset" else set()
    )
    assert torch.equal(q.initial_step, q.step.detach())
    assert q.is_initialized is True
    assert bool((q.step > 0).all())
    assert isinstance(q.q_min, int)
    assert isinstance(q.q_max, int)


def test_the_step_is_there_from_birth_and_stays_the_same_object() -> None:
    q = Quantizer(QuantSpec(4), count=3)
    step = q.step
    assert isinstance(step, torch.nn.Parameter)
    assert step.shape == (1,)
    assert q.is_initialized is False
    q.initialize(data(50))
    assert q.step is step


@pytest.mark.parametrize("name,count,bits,signed,g", [
    ("2 bits signed", 4608, 2, True, 0.014731391274719739),
    ("4 bits signed", 100, 4, True, 0.03779644730092272),
    ("4 bits unsigned", 60, 4, False, 0.0333333333333333),
    ("8 bits signed", 2359296, 8, True, 5.777060608177824e-05),
])  # fmt: skip
def test_gradient_scale(name: str, count: int, bits: int, signed: bool, g: float) -> None:
    q = ready(bits, signed=signed, count=count, x=data(40, unsigned=True))
    assert isinstance(q.gradient_scale, float)
    assert q.gradient_scale == pytest.approx(g, rel=1e-6)


def test_gradient_scale_is_that_of_one_sample() -> None:
    """The same g for any batch size, and the mean loss moves the step equally when the batch is repeated."""
    q = ready(count=12, x=data(5, 12))
    grads = []
    for repeats in (1, 2, 16):
        x = data(5, 12).repeat(repeats, 1)
        q.step.grad = None
        ((q(x) - 1) ** 2).sum(dim=1).mean().backward()
        assert q.gradient_scale == pytest.approx(1 / math.sqrt(12 * 7), rel=1e-6)
        assert q.step.grad is not None
        grads.append(q.step.grad.item())
    assert grads[1:] == pytest.approx([grads[0], grads[0]], rel=1e-3)
    assert abs(grads[0]) > 1e-3


# ---------------------------------------------------------------------------------------------- initialize


@pytest.mark.parametrize("negative", [True, False])
def test_the_sign_is_decided_by_the_data(negative: bool) -> None:
    x = data(100).abs()
    x[5] = 0.0  # zero is not negative
    if negative:
        x[37] = -1e-6
    q = ready(4, x=x)
    assert (q.q_min, q.q_max) == ((-8, 7) if negative else (0, 15))
    assert int(q.signed) == int(negative)


def test_the_sign_is_undecided_before() -> None:
    q = Quantizer(QuantSpec(4), count=3)
    assert int(q.signed) == -1
    with pytest.raises(ValueError, match="undecided"):
        _ = q.q_min
    with pytest.raises(ValueError, match="undecided"):
        _ = q.q_max


@varieties
def test_forward_equals_the_oracle(variety: str) -> None:
    arguments = VARIETIES[variety]
    q = ready(**arguments)
    layout = {k: arguments[k] for k in ("axis", "group_size") if k in arguments}
    x = (data(6, 30, seed=7) * 2).requires_grad_()
    step = q.step.detach().numpy()
    z: Any = 0
    if q.offset is not None:
        z = oracle.lsq_plus_zero_point(q.offset.detach().numpy(), step, q.q_min, q.q_max)
    before = (x.detach().numpy(), step, q.q_min, q.q_max)
    y = q(x)
    assert_same(y, torch.tensor(oracle.fake_quantize(*before, z, **layout)))
    upstream = data(6, 30, seed=8)
    y.backward(upstream)
    assert x.grad is not None
    assert q.step.grad is not None
    assert_same(x.grad, torch.tensor(oracle.element_gradient(upstream.numpy(), *before, z, **layout)))
    expected = oracle.step_gradient(
        upstream.numpy(), *before, q.gradient_scale, z, **layout, lsq_plus=variety == "offset"
    )
    assert_within(q.step.grad, *expected)
    codes = q.codes(x)
    assert codes.dtype == (torch.int8 if int(q.signed) == 1 else torch.uint8)
    assert torch.equal(codes.double(), torch.tensor(oracle.codes(*before, z, **layout)))
    if q.offset is not None:
        assert q.offset.grad is not None
        zero_point = q.zero_point()
        assert zero_point is not None
        assert zero_point.dtype == torch.int32
        assert torch.equal(zero_point.double(), torch.tensor(z))
        assert_within(q.offset.grad, *oracle.offset_gradient(upstream.numpy(), *before, q.gradient_scale, z))
    else:
        assert q.zero_point() is None


@pytest.mark.parametrize("bits,signed,narrow", [
    (b, s, n) for b in range(2, 9) for s, n in ((True, False), (True, True), (False, False))
])  # fmt: skip
def test_every_integer_as_int8_or_uint8(bits: int, signed: bool, narrow: bool) -> None:
    q = ready(bits, signed=signed, narrow=narrow, x=data(40, unsigned=not signed))
    k = torch.arange(q.q_min - 4, q.q_max + 5)
    codes = q.codes(k.float() * q.step.detach())
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(codes.long(), k.clamp(q.q_min, q.q_max))


@pytest.mark.parametrize("signed", [True, False])
def test_values_are_given_the_step_of_least_squared_error(signed: bool) -> None:
    """On activations after ReLU the paper's rule is far from it."""
    x = data(400, unsigned=not signed)
    q = ready(4, x=x)
    best, _ = oracle.best_squared_error(x.numpy(), q.q_min, q.q_max)
    assert oracle.squared_error(x.numpy(), q.step.item(), q.q_min, q.q_max) <= 1.001 * best
    paper = oracle.initial_step(x.numpy(), q.q_max)[0]
    assert oracle.squared_error(x.numpy(), paper, q.q_min, q.q_max) > 1.05 * best


BAD_DATA = {
    "NaN": torch.tensor([1.0, math.nan, 2.0]),
    "Inf": torch.tensor([1.0, math.inf]),
    "-Inf": torch.tensor([1.0, -math.inf]),
    "all zero": torch.zeros(30),
    "empty": torch.zeros(0, 30),
}


@pytest.mark.parametrize("method", ["mse", "paper"])
@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_is_refused_and_costs_nothing(what: str, method: Literal["mse", "paper"]) -> None:
    for q in (Quantizer(QuantSpec(4), count=3), ready()):
        before = copy.deepcopy(q.state_dict())
        with pytest.raises(ValueError):  # noqa: PT011 five causes, five messages
            q.initialize(BAD_DATA[what], method)
        assert all(torch.equal(now, before[name]) for name, now in q.state_dict().items())
        assert q.is_initialized is bool(before["initialized"])


def test_an_all_zero_channel_gets_the_median_of_the_others() -> None:
    x = data(6, 30) * torch.tensor([1.0, 2.0, 0.0, 3.0, 4.0, 5.0])[:, None]
    q = ready(4, granularity="channel", shape=(6,), axis=0, signed=True, x=x)
    others = q.step.detach()[[0, 1, 3, 4, 5]]
    assert bool((others > 0).all())
    assert q.step[2].item() == others.median().item()


# ---------------------------------------------------------------------------------------------- use before, wrong use


@pytest.mark.parametrize("use", ["forward", "codes", "effective_step"])
@pytest.mark.parametrize("signed", [None, True, False])
def test_use_before_initialisation_names_the_remedy(use: str, signed: bool | None) -> None:
    q = Quantizer(QuantSpec(4, signed=signed), count=3)
    with pytest.raises((RuntimeError, ValueError), match=r"calibrate|initialize"):
        {"forward": q, "codes": q.codes, "effective_step": lambda x: q.effective_step()}[use](data(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_integer_code(bad: float) -> None:
    """A cast to int8 would hide it."""
    q = ready()
    x = data(6, 30)
    x[2, 3] = bad
    with pytest.raises(ValueError, match="NaN"):
        q.codes(x)
    y = q(x)
    assert torch.equal(y.isnan(), ~x.isfinite())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_seen(bad: float) -> None:
    """The guard lets it through, so that the loss becomes NaN and a loss scaler skips the update."""
    q = ready()
    with torch.no_grad():
        q.step.fill_(bad)
    assert bool(q(data(6, 30)).isnan().all())
    with pytest.raises(ValueError, match="NaN"):
        q.codes(data(6, 30))


def test_a_count_is_required_for_use() -> None:
    def use() -> None:
        q = Quantizer(QuantSpec(4))
        q.initialize(data(30))
        q(data(30)).sum().backward()

    with pytest.raises((RuntimeError, ValueError), match="count"):
        use()


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (3,)])
def test_wrong_shapes_of_the_step_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape|step"):
        Quantizer(QuantSpec(4), shape, count=3).initialize(data(9, 3))


@pytest.mark.parametrize("count", [-1, 2.5, "3"])
def test_wrong_counts_are_refused(count: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        Quantizer(QuantSpec(4), count=count)


def test_wrong_input_shapes_are_refused() -> None:
    per_channel = ready(4, granularity="channel", shape=(6,), axis=0, signed=True)
    with pytest.raises(ValueError, match="6"):
        per_channel(data(5, 30))
    in_groups = ready(4, granularity="group", group_size=10, shape=(18,), signed=True)
    with pytest.raises(ValueError, match=r"step|group"):
        in_groups(data(6, 25))


# ---------------------------------------------------------------------------------------------- the guard


class NoReads(TorchDispatchMode):
    """Fails when a tensor is read back into Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(bad in name for bad in ("_local_scalar_dense", "is_nonzero", "aten.equal", "nonzero")), name
        return func(*args, **(kwargs or {}))


def crossed(**spec: Any) -> tuple[Quantizer, Tensor]:
    """A quantizer per channel whose steps 1 and 4 are below the guard, and the guarded steps."""
    q = ready(4, granularity="channel", shape=(6,), axis=0, signed=True, **spec)
    with torch.no_grad():
        q.step[1] = -0.3
        q.step[4] = 0.0
    guarded = q.step.detach().clone()
    guarded[[1, 4]] = q.initial_step[[1, 4]] * 2.0**-10
    return q, guarded


def test_guarded_forward_codes_and_gradients() -> None:
    q, guarded = crossed()
    x, upstream = data(6, 30, seed=3), data(6, 30, seed=4)
    assert torch.equal(q.effective_step(), guarded)
    arguments = (x.numpy(), guarded.numpy(), -8, 7)
    y = q(x)
    assert_same(y, torch.tensor(oracle.fake_quantize(*arguments, axis=0)))
    assert torch.equal(q.codes(x).double(), torch.tensor(oracle.codes(*arguments, axis=0)))
    y.backward(upstream)
    assert q.step.grad is not None
    expected = oracle.step_gradient(upstream.numpy(), *arguments, q.gradient_scale, axis=0)
    assert_within(q.step.grad, *expected)
    assert q.step.grad[1] != 0
    assert q.step.grad[4] != 0
    assert q.step[1].item() == pytest.approx(-0.3), "the parameter itself is left alone"


def test_guarded_steps_are_counted_in_training_only() -> None:
    q, _ = crossed()
    x = data(6, 30)
    assert int(q.guarded) == 0
    q.train()
    q(x)
    assert int(q.guarded) == 2
    q(x)
    assert int(q.guarded) == 4
    q.eval()
    q(x)
    q.codes(x)
    assert int(q.guarded) == 4
    assert "guarded" not in q.state_dict()
    with torch.no_grad():
        q.step.fill_(1.0)
    q.train()
    q(x)
    assert int(q.guarded) == 4


@varieties
def test_an_accelerator_reads_no_tensor_back_in_the_forward_and_backward_pass(
    variety: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "CPU_IS_READ_ALWAYS", False)  # the CPU stands for an accelerator
    q = ready(**VARIETIES[variety])
    assert q.is_initialized  # read once
    x = data(6, 30).requires_grad_()
    with NoReads():
        q(x).sum().backward()
        q.effective_step()


@varieties
@pytest.mark.parametrize("cpu_is_read_always", [True, False])
def test_fake_tensors_and_the_meta_device(
    variety: str, cpu_is_read_always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "CPU_IS_READ_ALWAYS", cpu_is_read_always)
    q = ready(**VARIETIES[variety])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert q(torch.empty(6, 30)).shape == (6, 30)  # raises where a value is needed
    fake = copy.deepcopy(q).to("meta")
    assert fake(torch.empty(6, 30, device="meta")).shape == (6, 30)
