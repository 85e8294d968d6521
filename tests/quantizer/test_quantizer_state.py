"""Quantizer: its state survives every way of moving and copying it; the quantizer inside a model."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch

import oracle
from helpers.engines import assert_same
from helpers.quantizers import VARIETIES, data, ready, varieties
from lsquant import Quantizer, QuantSpec, quantizer, reference

# ---------------------------------------------------------------------------------------------- moves


MOVES: dict[str, Any] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "to float16": lambda m: m.to(dtype=torch.float16),
    "to a device and a type": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "to like a tensor": lambda m: m.to(torch.empty(1, dtype=torch.float16)),
}


@pytest.mark.parametrize("move", MOVES)
@varieties
def test_the_step_stays_float32(variety: str, move: str) -> None:
    q = ready(**VARIETIES[variety])
    holder = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2), "quantizer": q})
    step, before = q.step, copy.deepcopy(q.state_dict())
    wide = data(6, 30)
    expected = q(wide)
    MOVES[move](holder)
    assert holder["linear"].weight.dtype != torch.float32, "the move did nothing"
    assert q.step is step
    assert q.step.dtype == q.initial_step.dtype == torch.float32
    after = q.state_dict()
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
    assert torch.equal(q(wide), expected)


@varieties
def test_the_meta_device_and_back(variety: str) -> None:
    q = ready(**VARIETIES[variety])
    state = copy.deepcopy(q.state_dict())
    moved = copy.deepcopy(q).to("meta")
    assert moved.step.device.type == "meta"
    assert moved.step.dtype == torch.float32
    moved.to_empty(device="cpu")
    moved.load_state_dict(state)
    x = data(6, 30)
    assert torch.equal(moved(x), q(x))


# ---------------------------------------------------------------------------------------------- copies and state


def _same_quantizer(a: Quantizer, b: Quantizer) -> None:
    x = data(6, 30, seed=11) * 2
    assert a is not b
    assert a.step is not b.step
    assert a.spec == b.spec
    assert (a.q_min, a.q_max, a.gradient_scale, a.is_initialized) == (b.q_min, b.q_max, b.gradient_scale, True)
    assert torch.equal(a(x), b(x))
    assert torch.equal(a.codes(x), b.codes(x))


@varieties
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(variety: str, how: str) -> None:
    q = ready(**VARIETIES[variety])
    if how == "deepcopy":
        copied = copy.deepcopy(q)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(q))
    else:
        buffer = io.BytesIO()
        torch.save(q, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    _same_quantizer(copied, q)
    with torch.no_grad():
        copied.step.mul_(2)
    assert not torch.equal(copied.step, q.step)


@varieties
@pytest.mark.parametrize("assign", [False, True])
def test_state_restores_everything(variety: str, assign: bool) -> None:
    """A fresh quantizer that knows neither sign, count nor step gives equal outputs after loading."""
    arguments = dict(VARIETIES[variety])
    q = ready(**arguments)
    with torch.no_grad():
        q.step.mul_(1.1)  # step and initial_step differ after training
    arguments.pop("x", None)
    own = {k: arguments.pop(k) for k in ("shape", "axis") if k in arguments}
    arguments.pop("count", None)
    fresh = Quantizer(QuantSpec(4, **arguments), **own)
    assert fresh.is_initialized is False
    buffer = io.BytesIO()
    torch.save(q.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer), strict=True, assign=assign)
    _same_quantizer(fresh, q)
    assert torch.equal(fresh.initial_step, q.initial_step)


def test_loading_into_a_quantizer_of_the_other_sign_takes_the_sign_of_the_state() -> None:
    signed, unsigned = ready(x=data(6, 30)), ready(x=data(6, 30).abs())
    assert (signed.q_min, unsigned.q_min) == (-8, 0)
    unsigned.load_state_dict(signed.state_dict())
    assert (unsigned.q_min, unsigned.q_max) == (-8, 7)
    _same_quantizer(unsigned, signed)


def test_loading_an_uninitialised_state_is_remembered() -> None:
    q = ready()
    q.load_state_dict(Quantizer(QuantSpec(4), count=30).state_dict())
    assert q.is_initialized is False
    with pytest.raises((RuntimeError, ValueError), match=r"calibrate|initialize"):
        q(data(6, 30))


def _other() -> tuple[Quantizer, Quantizer]:
    """A signed quantizer, and one that has another sign, N and step and has been used."""
    signed, unsigned = ready(x=data(6, 30)), ready(x=data(6, 30).abs(), count=7)
    unsigned(data(6, 30))
    assert (signed.q_min, unsigned.q_min) == (-8, 0)
    assert signed.elements_per_step != unsigned.elements_per_step
    return signed, unsigned


@torch.no_grad()
def _copy(source: Quantizer, to: Quantizer) -> None:
    for mine, theirs in zip(to.state_dict().values(), source.state_dict().values(), strict=True):
        mine.copy_(theirs)


@pytest.mark.parametrize("cpu_is_read_always", [True, False])  # False: as on an accelerator
def test_a_state_that_is_copied_tensor_by_tensor_restores_everything(
    cpu_is_read_always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As distributed checkpoints and averages of weights do: no method of the quantizer is called."""
    monkeypatch.setattr(quantizer, "CPU_IS_READ_ALWAYS", cpu_is_read_always)
    signed, unsigned = _other()
    _copy(signed, unsigned)
    _same_quantizer(unsigned, signed)
    with torch.no_grad():
        unsigned.initialized.fill_(False)
    assert not unsigned.is_initialized
    with pytest.raises(ValueError, match="calibrate"):
        unsigned(data(6, 30))


def test_on_a_cpu_a_write_through_data_is_seen() -> None:
    signed, unsigned = _other()
    for mine, theirs in zip(unsigned.state_dict().values(), signed.state_dict().values(), strict=True):
        mine.data.copy_(theirs)
    _same_quantizer(unsigned, signed)


def test_a_buffer_that_is_replaced_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "CPU_IS_READ_ALWAYS", False)
    signed, unsigned = _other()
    for name, t in signed.state_dict().items():
        if name in ("signed", "count", "initialized"):
            setattr(unsigned, name, t.clone())
        else:
            getattr(unsigned, name).data.copy_(t)
    _same_quantizer(unsigned, signed)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_compiled_code_follows_a_copied_state_once_the_quantizer_is_looked_at() -> None:
    torch._dynamo.reset()
    signed, unsigned = _other()
    compiled, x = torch.compile(unsigned, fullgraph=True, backend="aot_eager"), data(6, 30)
    compiled(x)
    _copy(signed, unsigned)
    assert unsigned.spec.signed
    assert torch.equal(compiled(x), signed(x))


def test_making_a_grid_counts_no_guards() -> None:
    q = ready().train()
    with torch.no_grad():
        q.step.fill_(-1.0)
    q.grid()
    assert int(q.guarded) == 0
    q(data(6, 30))
    assert int(q.guarded) == 1


def test_loading_into_another_shape_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        ready().load_state_dict(ready(4, granularity="channel", shape=(6,), axis=0, signed=True).state_dict())


# ---------------------------------------------------------------------------------------------- in a model


def test_one_quantizer_used_twice() -> None:
    q = ready()
    a, b = data(6, 30, seed=1), data(6, 30, seed=2)
    total = torch.zeros(1)
    for x in (a, b):
        total = total + torch.autograd.grad((q(x) * b).sum(), q.step)[0]
    ((q(a) + q(b)) * b).sum().backward()
    assert q.step.grad is not None
    assert torch.equal(q.step.grad, total)


def test_switched_off_it_passes_the_input_through() -> None:
    q = ready()
    x = data(6, 30)
    assert q.enabled is True
    q.enabled = False
    assert torch.equal(q(x), x)
    q.enabled = True
    assert not torch.equal(q(x), x)


def test_bfloat16_in_bfloat16_out() -> None:
    q = ready()
    x = data(6, 30).bfloat16()
    y = q(x)
    assert y.dtype == torch.bfloat16
    expected = oracle.fake_quantize(x.float().numpy(), q.step.detach().numpy(), -8, 7)
    assert_same(y, torch.tensor(expected).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert q(x).dtype == torch.bfloat16
        assert q.effective_step().dtype == torch.float32


# torch's own: dynamo makes an instance of autograd.Function while it traces one, inductor imports torch.jit
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("variety", ["channel", "offset"])
def test_compiled_equals_eager(variety: str, backend: str) -> None:
    torch._dynamo.reset()
    q = ready(**VARIETIES[variety])
    with torch.no_grad():
        q.step[0] = q.step[0] if variety == "offset" else -1.0  # the guard at work
    compiled = torch.compile(q, fullgraph=True, backend=backend)
    results = []
    for f in (q, compiled):
        x = data(6, 30).requires_grad_()
        q.step.grad = None
        q.guarded.zero_()
        y = f(x)
        y.backward(data(6, 30, seed=9))
        assert q.step.grad is not None
        results.append((y, x.grad, q.step.grad.clone(), q.guarded.clone()))
    for eager, other in zip(*results, strict=True):
        assert torch.equal(eager, other)


def test_the_reference_and_the_quantizer_agree_on_the_paper() -> None:
    """For a weight the paper's step is one call: Quantizer keeps what it is given."""
    w = data(6, 30)
    assert reference.initial_step(w, 7).item() == pytest.approx(2 * w.abs().mean().item() / math.sqrt(7), rel=1e-6)
