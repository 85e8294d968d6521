"""lsquant.diagnostics.collect against NumPy, field by field."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
import oracle
from helpers.diagnostics import array, by_hand
from helpers.report_pages import page_data
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import UsageError
from lsquant.diagnostics import collect
from lsquant.nn import quantizers


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


RECIPES = {
    "w2a2": Recipe(2, 2),
    "w8a8": Recipe(8, 8),
    "channel, offset": Recipe(QuantSpec(3, granularity="channel"), QuantSpec(4, offset=True)),
    "group, narrow": Recipe(QuantSpec(4, narrow=True), 4, [Rule("3", QuantSpec(3, granularity="group", group_size=8))]),
}






@pytest.mark.parametrize("name", RECIPES)
def test_every_field(name):
    model, batches = net(), [torch.randn(3, 2, 4, 4) + 0.3, torch.randn(5, 2, 4, 4)]
    lsquant.prepare(model, RECIPES[name])
    lsquant.calibrate(model, batches)
    with torch.no_grad():
        for _, q in quantizers(model):
            q.step.mul_(0.4)  # so that there is clipping
    model.train()
    facts = collect(model, batches)
    assert [(f.layer, f.kind) for f in facts] == [("0", "weight"), ("0", "input"), ("3", "weight"), ("3", "input")]
    assert [f.name for f in facts] == [name for name, _ in quantizers(model)]
    assert model.training
    hidden = [array(model[:3](x)) for x in batches]
    values = {
        "0.weight_quantizer": [array(model[0].weight)], "0.input_quantizer": [array(x) for x in batches],
        "3.weight_quantizer": [array(model[3].weight)], "3.input_quantizer": hidden,
    }  # fmt: skip
    for f, (own, q) in zip(facts, quantizers(model), strict=True):
        want = by_hand(q, values[own])
        if f.kind == "weight":
            elements = values[own][0].size
            want["size"] = math.ceil(elements * q.spec.bits / 8) + 4 * q.step.numel()
        else:
            want["size"] = None
        want |= {"layer": own.split(".")[0], "kind": own.split(".")[1].split("_")[0], "balance": None}
        got = dataclasses.asdict(f)
        assert got.keys() == want.keys()
        for field, value in want.items():
            assert got[field] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), (own, field)
    assert any(f.clip_high > 0 for f in facts)
    assert any(f.clip_low > 0 for f in facts)


def test_literal_numbers():
    layer = nn.Linear(4, 2, bias=False)
    lsquant.prepare(layer, Recipe(2, 2))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.5, -1.0, -2.0], [0.0, 0.2, 0.5, 0.25]]))
        layer.weight_quantizer.step.fill_(0.5)
    (f,) = collect(layer)  # codes 1 -1 -2 -2 / 0 0 1 0
    assert f.name == "weight_quantizer"
    assert (f.layer, f.kind, f.levels, f.levels_used, f.elements) == ("", "weight", 4, 4, 8)
    assert (f.clip_low, f.clip_high) == (1 / 8, 0.0)  # -4 is below -2; -2 and 1 are the end levels themselves
    assert f.entropy == pytest.approx(
        -(2 / 8 * math.log2(2 / 8) * 2 + 1 / 8 * math.log2(1 / 8) + 3 / 8 * math.log2(3 / 8))
    )
    signal = 0.25 + 0.25 + 1 + 4 + 0.04 + 0.25 + 0.0625
    assert f.sqnr == pytest.approx(10 * math.log10(signal / (1.0 + 0.04 + 0.0625)), rel=1e-6)
    assert f.size == 2 + 4  # 8 codes of 2 bits, one step
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.5, -1.0, 0.0]] * 2))
    assert collect(layer)[0].sqnr == math.inf


def test_r_is_that_of_the_gradients_present():
    model, x = net(), torch.randn(6, 2, 4, 4)
    lsquant.prepare(model, Recipe(QuantSpec(2, granularity="channel"), 2))
    lsquant.calibrate(model, [x])
    assert {f.balance for f in collect(model, [x])} == {None}
    model(x).square().sum().backward()
    for f, (_, q) in zip(collect(model, [x]), quantizers(model), strict=True):
        layer = model[int(f.layer)]
        w, grad = array(layer.weight), array(layer.weight.grad)
        axis = 0 if f.kind == "weight" else None
        want = oracle.step_balance(w, grad, array(q.step), array(q.step.grad), axis=axis)
        assert f.balance == pytest.approx(float(np.sort(want)[(want.size - 1) // 2]), rel=1e-5)
        assert f.balance > 0


def test_guarded_steps():
    model, x = net(), torch.randn(6, 2, 4, 4)
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.calibrate(model, [x])
    q = model[3].weight_quantizer
    with torch.no_grad():
        q.step.fill_(-1.0)
    model.train()
    model(x)
    model(x)
    facts = {f.name: f for f in collect(model)}
    assert {name: f.guarded for name, f in facts.items()} == {"0.weight_quantizer": 0, "3.weight_quantizer": 2}
    assert facts["3.weight_quantizer"].step == q.initial_step.item() * 2.0**-10
    collect(model, [x])
    assert int(q.guarded) == 2  # looking is no training


def test_without_batches_only_weights_and_without_quantizers_nothing():
    model = net()
    lsquant.prepare(model, Recipe(4, 4))
    assert [f.name for f in collect(model)] == ["0.weight_quantizer", "3.weight_quantizer"]
    with pytest.raises(UsageError, match=r"'0\.input_quantizer' has no step yet"):
        collect(model, [torch.randn(1, 2, 4, 4)])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert collect(net(), [torch.randn(1, 2, 4, 4)]) == []


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = lsquant.Quantizer(lsquant.QuantSpec(2, signed=True), count=4)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.own(x))


def test_a_quantizer_that_stands_alone(tmp_path):
    model, x = Alone(), torch.tensor([[-9.0, -1.0, 0.0, 1.0], [1.0, 1.0, 9.0, 9.0]])
    lsquant.prepare(model, Recipe(4))
    with torch.no_grad():
        model.own.initialize(x)
        model.own.step.fill_(1.0)
    weight, alone = collect(model, [x])
    assert (weight.name, alone.name, alone.kind, alone.size, alone.balance) == (
        "linear.weight_quantizer", "own", "alone", None, None,
    )  # fmt: skip
    assert (alone.clip_low, alone.clip_high, alone.levels_used) == (1 / 8, 2 / 8, 4)  # -2 -1 0 1 / 1 1 1 1
    assert [f.name for f in collect(model)] == ["linear.weight_quantizer"]
    lsquant.write_report(model, tmp_path / "r.html", [x])
    rows = page_data(tmp_path / "r.html")["runs"][0]["quantizers"]
    assert [(row["name"], row["kind"], row["bits"]) for row in rows][1] == ("own", "alone", 2)


def test_a_layer_used_twice_and_max_batches():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, shared)
    lsquant.prepare(model, Recipe(4, 4))
    batches = [torch.randn(3, 4) for _ in range(5)]
    lsquant.calibrate(model, batches)
    facts = collect(model, batches, max_batches=2)
    assert [(f.name, f.elements) for f in facts] == [("0.weight_quantizer", 16), ("0.input_quantizer", 2 * 2 * 12)]


def test_the_model_is_left_as_it_was():
    model, x = net(), torch.randn(6, 2, 4, 4)
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.calibrate(model, [x])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model[0].eval()
    collect(model, [(x, "label")])
    collect(model, [{"x": x}], forward=lambda m, batch: m(batch["x"]))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [m.training for m in model] == [False, True, True, True]
    assert not any(m._forward_pre_hooks for m in model.modules())
