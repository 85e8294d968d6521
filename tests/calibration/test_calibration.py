"""calibrate: N, signs, steps against the oracle's search, every refusal, and what a refusal costs: nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lsquant
import oracle
from lsquant import Quantizer, QuantSpec, Recipe, Rule, mse
from lsquant._util.errors import UsageError
from lsquant.nn import quantizers

W4A4 = Recipe(4, 4)


def net(recipe: Recipe = W4A4) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(2), nn.Linear(30, 5))
    lsquant.prepare(model, recipe)
    return model


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 5, 6)


def states(model: nn.Module) -> dict[str, Any]:
    """Everything a quantizer knows."""
    found: dict[str, Any] = {name: t.clone() for name, t in model.state_dict().items()}
    for name, q in quantizers(model):
        found[name] = (q.spec, q.requested, q.is_initialized, q.elements_per_step, q.enabled, q.filled_steps)
    return found


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = states(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            same = bool(((value == after[name]) | ((value != value) & (after[name] != after[name]))).all())
        else:
            same = value == after[name]
        assert same, f"{name} was {value}, is {after[name]}"
    assert not any(m._forward_pre_hooks for m in model.modules())


# ---- N and signs ----


def test_n_is_the_features_of_one_sample_frozen_by_the_first_batch():
    model = net()
    lsquant.calibrate(model, [images(2), images(7)])
    counts = {name: (int(q.count), q.elements_per_step) for name, q in quantizers(model)}
    assert counts == {
        "0.weight_quantizer": (108, 108), "0.input_quantizer": (90, 90),
        "3.weight_quantizer": (150, 150), "3.input_quantizer": (30, 30),
    }  # fmt: skip
    conv = nn.Conv2d(3, 4, 3)
    lsquant.prepare(conv, W4A4)
    lsquant.calibrate(conv, [torch.randn(2, 3, 5, 6), torch.randn(2, 3, 8, 8)])
    lsquant.calibrate(conv, [torch.randn(2, 3, 9, 9)], again=True)
    assert int(conv.input_quantizer.count) == 90


def test_a_repeated_batch_gives_the_same_g_and_steps():
    x, found = images(), []
    for batches in ([x], [x.repeat(5, 1, 1, 1)], [x, x, x]):
        torch.manual_seed(0)
        model = net()
        lsquant.calibrate(model, batches)
        found.append([(q.gradient_scale, q.step.item()) for _, q in quantizers(model)])
    assert found[1] == [pytest.approx(pair, rel=1e-6) for pair in found[0]]
    assert found[2] == [pytest.approx(pair, rel=1e-6) for pair in found[0]]


def test_signs_are_decided_by_any_negative_value():
    model = nn.Sequential(nn.Linear(3, 3))
    for rows, signed in (([1.0, 2.0], False), ([0.0, 2.0], False), ([5.0, -1e-3], True)):
        lsquant.prepare(model, W4A4, steps="recalibrate")
        lsquant.calibrate(model, [torch.full((2, 3), value) for value in rows], again=True)
        q = model[0].input_quantizer
        assert q.spec.signed is signed
        assert int(q.signed) == signed
        assert (q.q_min, q.q_max) == ((-8, 7) if signed else (0, 15))
        assert q.requested.signed is None
    lsquant.prepare(model, Recipe(4, QuantSpec(4, signed=True)))
    lsquant.calibrate(model, [torch.ones(2, 3)], again=True)
    assert model[0].input_quantizer.q_min == -8


def test_calibrating_again_decides_anew():
    model = nn.Sequential(nn.Linear(3, 3))
    lsquant.prepare(model, W4A4)
    lsquant.calibrate(model, [-torch.ones(2, 3)])
    weight = model[0].weight_quantizer.step.clone()
    lsquant.calibrate(model, [torch.ones(2, 3)], again=True)
    assert model[0].input_quantizer.spec.signed is False
    assert torch.equal(model[0].weight_quantizer.step, weight)  # only activation steps are calibrated


# ---- the step ----


def assert_good(q: Quantizer, values: torch.Tensor) -> None:
    best, _ = oracle.best_squared_error(values.numpy(), q.q_min, q.q_max)
    mine = oracle.squared_error(values.numpy(), q.step.item(), q.q_min, q.q_max)
    assert mine <= 1.001 * best
    assert torch.equal(q.step, q.initial_step)


DATA = {
    "normal": lambda: torch.randn(6, 120),
    "after relu": lambda: torch.randn(6, 120).relu(),
    "heavy tails": lambda: torch.randn(6, 120) ** 3,
    "one outlier": lambda: torch.cat([torch.rand(719), torch.tensor([80.0])]).reshape(6, 120),
    "few values": lambda: torch.randint(0, 3, (6, 120)).float(),
    "tiny": lambda: torch.randn(6, 120) * 1e-20,
}


@pytest.mark.parametrize("limit", [None, 300])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("data", DATA)
def test_the_step_is_within_a_thousandth_of_the_best(data, bits, limit, monkeypatch):
    """In several batches; with a small limit the values are kept in bins from the third one on."""
    if limit:
        monkeypatch.setattr(mse, "RAW_LIMIT", limit)
    layer, x = nn.Linear(120, 2), DATA[data]()
    lsquant.prepare(layer, Recipe(4, bits))
    lsquant.calibrate(layer, x.split(2))
    assert_good(layer.input_quantizer, x)


def test_bins_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(mse, "RAW_LIMIT", 1000)
    summary = mse.ValueSummary()
    sizes = []
    for _ in range(12):
        summary.add(torch.rand(5000) + 1.0)
        assert not summary._raw
        sizes.append(summary._bins[0].size)
    assert summary.total == 60000
    assert sizes[-1] <= 2**13 + 1  # values of one power of two


def test_the_layers_values_are_those_of_the_float_model():
    model = net()
    x = images()
    with lsquant.disabled(model):
        hidden = model[:3](x).detach()
    lsquant.calibrate(model, [x])
    assert_good(model[0].input_quantizer, x)
    assert_good(model[3].input_quantizer, hidden)


def test_the_papers_rule_literal():
    model = nn.Sequential(nn.Linear(2, 2))
    lsquant.prepare(model, W4A4)
    lsquant.calibrate(model, [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])], method="paper")
    assert model[0].input_quantizer.step.item() == pytest.approx(2 * 1.5 / 15**0.5, rel=1e-6)
    lsquant.calibrate(model, [torch.tensor([[1.0, -2.0]])], method="paper", again=True)
    assert model[0].input_quantizer.step.item() == pytest.approx(2 * 1.5 / 7**0.5, rel=1e-6)
    with pytest.raises(UsageError, match="'mse' or 'paper'"):
        lsquant.calibrate(model, [torch.ones(1, 2)], method="best")


def test_an_offset_is_set_with_the_step():
    layer, x = nn.Linear(250, 2), torch.rand(8, 250) + 0.5
    x[0, 0] = -0.25
    lsquant.prepare(layer, Recipe(4, QuantSpec(4, offset=True)))
    lsquant.calibrate(layer, [x])
    q = layer.input_quantizer
    z = int(q.zero_point())
    assert q.offset.item() == pytest.approx(-z * q.step.item(), rel=1e-6)
    symmetric, _ = oracle.best_squared_error(x.numpy(), -8, 7)
    assert oracle.squared_error(x.numpy(), q.step.item(), 0, 15, z) < symmetric


def test_weight_only_needs_no_calibration():
    model = net(Recipe(4))
    y = model(images())
    lsquant.calibrate(model, [images()])
    assert y.isfinite().all()


def test_a_module_used_twice_is_calibrated_on_all_its_inputs():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, shared)
    lsquant.prepare(model, W4A4)
    x = torch.randn(50, 6)
    with lsquant.disabled(model):
        both = torch.cat([x, shared(x).detach()])
    lsquant.calibrate(model, [x])
    assert_good(shared.input_quantizer, both)


def test_a_stand_alone_quantizer_is_calibrated_too():
    quantizer = Quantizer(QuantSpec(4), count=6)
    model = nn.Sequential(nn.Linear(6, 6), quantizer)
    lsquant.prepare(model, W4A4)
    lsquant.calibrate(model, [torch.randn(9, 6)])
    assert quantizer.is_initialized
    assert quantizer.gradient_scale == pytest.approx(1 / (6 * 7) ** 0.5, rel=1e-6)
    model = nn.Sequential(nn.Linear(6, 6), Quantizer(QuantSpec(4)))
    lsquant.prepare(model, W4A4)
    before = states(model)
    with pytest.raises(UsageError, match=r"'1' is a stand-alone Quantizer without N; .*count=N"):
        lsquant.calibrate(model, [torch.randn(9, 6)])
    assert_unchanged(model, before)


# ---- batches ----


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, values: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.linear(input=values * scale)


@pytest.mark.parametrize("how", ["tensor", "tuple", "list", "mapping", "forward", "generator"])
def test_batches_of_every_kind(how):
    model, x = Named(), torch.randn(3, 4)
    lsquant.prepare(model, W4A4)
    forward = None
    if how == "forward":
        batch: Any = {"x": x, "y": 3}
        forward = lambda m, b: m(b["x"], scale=2.0)  # noqa: E731
    else:
        batch = {"tuple": (x, "label"), "list": [x, 3], "mapping": {"values": x, "scale": 2.0}}.get(how, x)
    lsquant.calibrate(model, (b for b in [batch]) if how == "generator" else [batch], forward=forward)
    assert_good(model.linear.input_quantizer, x * (2.0 if how in ("mapping", "forward") else 1.0))


def test_max_batches_asks_for_no_more():
    def batches() -> Any:
        for k in range(40):
            asked.append(k)
            yield torch.ones(1, 4)

    for limit, expected in ((3, 3), (32, 32), (None, 40)):
        asked: list[int] = []
        model = Named()
        lsquant.prepare(model, W4A4)
        lsquant.calibrate(model, batches(), max_batches=limit)
        assert len(asked) == expected
    asked = []
    lsquant.calibrate(model, batches(), again=True)
    assert len(asked) == 32


def test_modes_and_switches_are_restored():
    model = net()
    model[3].eval()
    model.append(nn.Dropout(0.5))
    modes = {}
    model[0].register_forward_hook(lambda *_: modes.update({n: m.training for n, m in model.named_modules()}))
    lsquant.calibrate(model, [images()])
    assert set(modes.values()) == {False}
    assert [m.training for m in model] == [True, True, True, False, True]
    assert model.training
    assert all(q.enabled for _, q in quantizers(model))
    assert all(p.grad is None for p in model.parameters())


# ---- refusals ----


def dead(model: nn.Sequential) -> list[torch.Tensor]:
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-100.0)  # nothing gets through the ReLU
    return [images()]


BAD: dict[str, tuple[Any, str]] = {
    "nan": (lambda m: [images(), torch.full((1, 3, 5, 6), torch.nan)], r"at '0' 90 of 90 values are NaN"),
    "inf": (lambda m: [images(), torch.full((1, 3, 5, 6), -torch.inf)], r"at '0' .*NaN or infinite"),
    "zero": (lambda m: [torch.zeros(2, 3, 5, 6)], r"all input values of layer '0' are zero"),
    "dead layer": (dead, r"all input values of layer '3' are zero"),
    "empty batches": (lambda m: [images(0), images(0)], r"'0' was not reached by any batch with values"),
    "no batch": (lambda m: [], r"no batches.*a generator can be used only once"),
    "a tensor": (lambda m: images(), r"pass \[batch\]"),
    "empty tuple": (lambda m: [()], r"empty batch"),
    "another type": (lambda m: ["abc"], r"type str .*forward="),
    "denormal": (lambda m: [torch.full((2, 3, 5, 6), 1e-44)], r"'0.* zero"),
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_bad_batches_are_refused_by_name_and_cost_nothing(what, calibrated):
    model = net()
    if calibrated:
        lsquant.calibrate(model, [images()])
    make, says = BAD[what]
    batches = make(model)
    before = states(model)
    with pytest.raises(UsageError, match=says):
        lsquant.calibrate(model, batches, again=calibrated)
    assert_unchanged(model, before)
    assert model.training


def test_a_failure_in_a_late_layer_leaves_the_early_ones():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1e-42)
        model[0].bias.zero_()
    lsquant.prepare(model, W4A4)
    before = states(model)
    with pytest.raises(UsageError, match=r"'3"):
        lsquant.calibrate(model, [images()])
    assert_unchanged(model, before)


def test_an_exhausted_generator():
    model, x = net(), images()
    batches = (b for b in [x])
    lsquant.calibrate(model, batches)
    with pytest.raises(UsageError, match="generator can be used only once"):
        lsquant.calibrate(model, batches)


def test_an_error_of_the_model_itself_is_passed_on():
    model = net()
    before = states(model)
    with pytest.raises(UsageError, match=r"layer '0'.*2 features or channels.*takes 3"):
        lsquant.calibrate(model, [images(), torch.randn(1, 2, 5, 6)])
    assert_unchanged(model, before)
    model.forward = lambda x: x.reshape(7, 7, 7)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        lsquant.calibrate(model, [images()])
    assert_unchanged(model, before)


def test_a_layer_that_no_batch_reaches():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "spare": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    lsquant.prepare(model, W4A4)
    before = states(model)
    with pytest.raises(UsageError, match=r"'spare' was not reached by any batch.*skip="):
        lsquant.calibrate(model, [torch.ones(2, 3)])
    assert_unchanged(model, before)
    lsquant.prepare(model, Recipe(4, 4, [Rule("spare", activation=None)]))
    lsquant.calibrate(model, [torch.ones(2, 3)])


@pytest.mark.parametrize(
    "value, says",
    [(0.0, "all values are zero"), (torch.nan, ".*6 of 6 values are NaN"), (1e-44, "all values are zero")],
)
def test_weights_without_a_step(value, says):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 3))
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[2].weight, value)
    lsquant.prepare(model, W4A4)
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    before = states(model)
    with pytest.raises(UsageError, match=rf"'2\.weight_quantizer': {says}"):
        lsquant.calibrate(model, [torch.ones(2, 3)])
    assert_unchanged(model, before)


def test_a_float_model_is_refused():
    with pytest.raises(UsageError, match=r"no quantizers; call lsquant\.prepare"):
        lsquant.calibrate(nn.Linear(2, 2), [torch.ones(1, 2)])
