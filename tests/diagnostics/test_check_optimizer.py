"""`check`: what is wrong with an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from helpers.checked import Cnn, codes, images, sgd, trained_cnn
from lsquant import QuantSpec, Recipe, check


@pytest.fixture
def cnn() -> tuple[nn.Module, Any, list]:
    return trained_cnn()


def test_optimizer_built_before_prepare():
    model, data = Cnn(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lsquant.prepare(model, Recipe.preset("w4a4"))
    lsquant.calibrate(model, data)
    found = check(model, optimizer)
    assert [(f.code, f.where) for f in found] == [("step_missing", "optimizer")]  # one reason, one finding
    assert "none of the model's 6 steps" in found[0].message
    assert "after prepare" in found[0].remedy
    assert found[0].evidence["steps"] == [f"{name}.step" for name, _ in lsquant.quantizers(model)]
    held = [p for p in model.parameters() if p is not model.conv.input_quantizer.step]
    found = check(model, torch.optim.SGD(held, lr=0.1))
    assert codes(found) == {("step_missing", "conv.input_quantizer.step")}


def test_weights_and_steps_that_are_missing_are_named_apart():
    model, data = Cnn(), images()
    lsquant.prepare(model, Recipe.preset("w4a4"))
    lsquant.calibrate(model, data)
    found = check(model, torch.optim.SGD(model.head.parameters(recurse=False), lr=0.1))
    assert ("step_missing", "optimizer") in codes(found)
    assert {f.where for f in found if f.code == "weight_missing"} == {"stem.weight", "conv.weight"}


def test_a_missing_offset():
    spec = QuantSpec(4, offset=True)
    model, data = Cnn(), images()
    lsquant.prepare(model, Recipe(weight=4, activation=spec))
    lsquant.calibrate(model, data)
    left_out = model.conv.input_quantizer.offset
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not left_out], lr=0.1)
    assert codes(check(model, optimizer)) == {("step_missing", "conv.input_quantizer.offset")}


def test_steps_decayed(cnn):
    model = cnn[0]
    found = check(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert {f.code for f in found} == {"step_decayed"}
    assert len(found) == 6
    assert found[0].evidence == {"weight_decay": 0.01}


def test_steps_frozen(cnn):
    model = cnn[0]
    groups = lsquant.param_groups(model, 0.1, step_lr=0.0)
    assert {f.code for f in check(model, torch.optim.SGD(groups, lr=0.1))} == {"step_frozen"}
    model.conv.weight_quantizer.step.requires_grad_(False)
    assert codes(check(model, sgd(model))) == {("step_frozen", "conv.weight_quantizer.step")}


def test_parameter_created_anew(cnn):
    model, optimizer, _ = cnn
    quantizer = model.conv.weight_quantizer
    quantizer.step = nn.Parameter(quantizer.step.detach().clone())
    assert codes(check(model, optimizer)) == {
        ("stale_parameters", "optimizer"),
        ("step_missing", "conv.weight_quantizer.step"),
    }


def test_weight_replaced(cnn):
    model, optimizer, _ = cnn
    model.conv.weight = nn.Parameter(model.conv.weight.detach().clone())
    found = check(model, optimizer)
    assert codes(found) == {("stale_parameters", "optimizer"), ("weight_missing", "conv.weight")}
    assert [f.severity for f in found] == ["error", "warning"]
    assert found[0].evidence["shapes"] == [(8, 8, 3, 3)]


def test_weight_missing(cnn):
    model = cnn[0]
    steps = lsquant.param_groups(model, 0.1)[2:]
    found = check(model, torch.optim.SGD(steps, lr=0.1))
    assert codes(found) == {("weight_missing", f"{n}.weight") for n in ("stem", "conv", "head")}


def test_parameters_of_another_module_are_a_note(cnn):
    model, optimizer, _ = cnn
    optimizer.add_param_group({"params": list(nn.Linear(2, 2).parameters())})
    (finding,) = check(model, optimizer)
    assert (finding.code, finding.severity) == ("stale_parameters", "note")
