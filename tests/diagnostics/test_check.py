"""`check`: every finding is provoked by a planted fault; healthy models have none."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import lsquant
from helpers.checked import Cnn, Encoder, codes, images, sgd, tokens, trained, trained_cnn
from lsquant import Quantizer, Recipe, check
from lsquant._util.errors import UsageError
from lsquant.diagnostics.findings import CODES, SEVERITIES


@pytest.fixture
def cnn() -> tuple[nn.Module, Any, list]:
    return trained_cnn()


# ---- healthy ----


@pytest.mark.parametrize("preset", ["w2a2", "w3a3", "w4a4", "w8a8", "w4"])
def test_a_healthy_cnn_has_no_findings(preset):
    data = images()
    model, optimizer = trained(Cnn(), data, preset)
    assert check(model, optimizer, data) == []
    model.train()
    assert check(model, [optimizer]) == check(model) == []
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("activation", [F.gelu, F.relu, F.silu])
@pytest.mark.parametrize("preset", ["w2a2", "w4a4", "w8a8", "w4g8"])
def test_a_healthy_transformer_has_no_findings(preset, activation):
    data = tokens()
    model, optimizer = trained(Encoder(activation), data, preset)
    assert [str(f) for f in check(model, optimizer, data)] == []


def test_pixels_of_few_values_are_no_finding():
    """8-bit inputs that take 17 values, as the digits, lose nothing: the step may leave most codes unused."""
    data = [(torch.randint(17, (64, 1, 8, 8)) / 16.0, torch.randint(4, (64,))) for _ in range(2)]
    model, optimizer = trained(Cnn(), data, "w2a2", steps=4)
    with torch.no_grad():
        model.stem.input_quantizer.step.fill_(1 / 16)  # codes 0 to 16 of 255
    assert check(model, optimizer, data) == []


def test_schedule_at_its_end_is_no_finding(cnn):
    """A learning rate of 0 everywhere is the end, or the start, of a schedule."""
    model, optimizer, _ = cnn
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert check(model, optimizer) == []


def test_a_frozen_weight_is_no_finding(cnn):
    model = cnn[0]
    model.stem.weight.requires_grad_(False)
    assert check(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)) == []


def test_nothing_is_changed(cnn):
    model, optimizer, data = cnn
    before, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    guarded = [int(q.guarded) for q in model.modules() if isinstance(q, Quantizer)]
    check(model, optimizer, data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert guarded == [int(q.guarded) for q in model.modules() if isinstance(q, Quantizer)]


# ---- the model ----


def test_not_prepared():
    (finding,) = check(Cnn(), batches=images())
    assert (finding.code, finding.severity) == ("not_prepared", "error")
    assert "lsquant.prepare" in finding.remedy


def test_unset_steps_and_the_rest_is_still_looked_at(cnn):
    model, optimizer, data = cnn
    model.conv.input_quantizer.forget()
    with torch.no_grad():
        model.head.input_quantizer.step.mul_(1e-2)
    found = check(model, optimizer, data)
    assert codes(found) == {("step_unset", "conv.input_quantizer"), ("step_collapsed", "head.input_quantizer")}
    assert found[0].severity == "error"  # errors first
    assert model.conv.input_quantizer.enabled


def test_prepared_but_not_calibrated():
    model = Cnn()
    lsquant.prepare(model, Recipe.preset("w4a4"))
    assert codes(check(model, batches=images())) == {
        ("step_unset", f"{name}.input_quantizer") for name in ("stem", "conv", "head")
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_step_not_finite(cnn, bad):
    model, optimizer, data = cnn
    with torch.no_grad():
        model.conv.weight_quantizer.step.fill_(bad)
    assert codes(check(model, optimizer, data)) == {("step_not_finite", "conv.weight_quantizer")}


def test_step_below_guard(cnn):
    model, optimizer, _ = cnn
    with torch.no_grad():
        model.conv.weight_quantizer.step.fill_(-0.1)
    (finding,) = check(model, optimizer)
    assert (finding.code, finding.where) == ("step_below_guard", "conv.weight_quantizer")
    assert finding.evidence["below"] == finding.evidence["steps"] == 1


def test_guarded_often(cnn):
    model, optimizer, data = cnn
    quantizer = model.conv.input_quantizer
    kept = quantizer.step.detach().clone()
    with torch.no_grad():
        quantizer.step.fill_(-1e-3)
    for _ in range(11):
        model.train()(data[0][0])
    with torch.no_grad():
        quantizer.step.copy_(kept)
    (finding,) = check(model, optimizer)
    assert (finding.code, finding.where) == ("guarded_often", "conv.input_quantizer")
    assert finding.evidence["guarded"] == 11


def test_switched_off(cnn):
    model, optimizer, data = cnn
    with lsquant.disabled(model, "head"):
        found = codes(check(model, optimizer, data))
        assert found == {("switched_off", f"head.{kind}_quantizer") for kind in ("weight", "input")}
    assert check(model, optimizer, data) == []


def test_tied_after_prepare():
    model, data = Encoder(), tokens()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    lsquant.prepare(model, Recipe.preset("w4a4"), data[0])
    lsquant.calibrate(model, data)
    assert check(model, batches=data) == []
    model.head.weight = model.embed.weight
    assert ("tied_twice", "head") in codes(check(model, sgd(model), data))


class Own(nn.Linear):
    """A user's own kind of linear layer."""


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.MultiheadAttention(16, 2, batch_first=True), "computes with its weights directly"),
        (nn.LSTM(16, 16, batch_first=True), "computes with its weights directly"),
        (Own(16, 16), "subclass of Linear"),
        (nn.Bilinear(16, 16, 16), "not supported"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_that_stay_float(layer, reason):
    model = nn.Sequential(nn.Linear(16, 16), layer)
    lsquant.prepare(model, Recipe.preset("w4"))
    (finding,) = check(model)
    assert (finding.code, finding.where, finding.severity) == ("stays_float", "1", "warning")
    assert reason in finding.message
    assert finding.evidence["share"] > 0.1


def test_the_share_that_stays_float_is_that_of_its_own_weights():
    """Neither a layer that the recipe leaves out, nor one that is told by itself."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos = nn.Parameter(torch.randn(16, 9))
            self.emb, self.fc = nn.Embedding(24, 16), nn.Linear(16, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            h = self.emb(x)
            return self.fc(h + self.attention(h, h, h)[0])

    model = Net()
    lsquant.prepare(model, Recipe.preset("w4a4", skip=["emb"]))
    found = {f.where: f.evidence["weights"] for f in lsquant.check(model) if f.code == "stays_float"}
    assert found == {"": 16 * 9, "attention": 4 * 16 * 16}


def test_a_layer_whose_weight_a_hook_makes_stays_float():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[1], "weight", 0.5)
    lsquant.prepare(model, lsquant.Recipe(4, 8))
    (finding,) = [f for f in lsquant.check(model) if f.code == "stays_float"]
    assert (finding.where, finding.severity) == ("1", "warning")
    assert "pruning makes its weight anew for each forward pass" in finding.message
    assert "prune.remove(layer, 'weight')" in finding.message


def test_layers_that_no_writer_takes_and_layers_that_came_later():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 2))
    lsquant.prepare(model, lsquant.Recipe(4, None))
    prune.l1_unstructured(model[0], "weight", 0.5)
    model[2] = nn.Linear(40, 2)
    found = {f.code: f for f in lsquant.check(model)}
    assert set(found) == {"unfit", "added_later"}
    assert (found["unfit"].where, found["unfit"].severity) == ("0", "error")
    assert "so it has no fixed codes" in found["unfit"].message
    assert (found["added_later"].where, found["added_later"].severity) == ("2", "note")
    assert found["added_later"].evidence["weights"] == 80
    assert "with 2.4% of the weights" in found["added_later"].message


def test_a_small_layer_that_stays_float_is_a_note():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), Own(64, 2))
    lsquant.prepare(model, Recipe.preset("w4"))
    assert [f.severity for f in check(model)] == ["note"]


def test_quantized_layers_inside_do_not_count():
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection, self.position = nn.Linear(16, 16), nn.Parameter(torch.ones(4, 16))

    model = nn.Sequential(nn.Linear(16, 16), Patches())
    lsquant.prepare(model, Recipe.preset("w4"))
    (finding,) = check(model)
    assert (finding.where, finding.evidence["weights"], finding.evidence["share"]) == ("1", 64, 64 / (256 + 256 + 64))


def test_a_layer_that_the_recipe_leaves_float_is_no_finding():
    model, data = Cnn(), images()
    lsquant.prepare(model, Recipe.preset("w4a4", skip=["stem"]), data[0])
    lsquant.calibrate(model, data)
    assert check(model, sgd(model), data) == []


# ---- what a finding is ----


def test_wrong_arguments(cnn):
    model = cnn[0]
    with pytest.raises(UsageError, match="an nn"):
        check("model")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="give a torch optimizer"):
        check(model, model.parameters())
    with pytest.raises(UsageError, match="no batches"):
        check(model, batches=[])
    with pytest.raises(UsageError, match="not an iterable of batches"):
        check(model, batches=torch.randn(2, 1, 8, 8))


def test_an_error_in_the_model_leaves_it_as_it_was(cnn):
    model = cnn[0]
    model.conv.input_quantizer.forget()
    with pytest.raises(UsageError, match="'stem': the input has 3"):
        check(model, batches=[torch.randn(2, 3, 8, 8)])
    assert model.conv.input_quantizer.enabled
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_finding_prints_in_two_lines_and_is_frozen():
    (finding,) = check(Cnn())
    first, second = str(finding).split("\n")
    assert first.startswith("error: (root): ")
    assert first.endswith("[not_prepared]")
    assert second.strip().startswith("remedy: ")
    with pytest.raises(dataclasses.FrozenInstanceError):
        finding.code = "other"  # type: ignore[misc]
    assert len({finding, finding}) == 1


def test_what_an_integer_only_network_computes_in_floating_point_is_a_note():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2)).eval(), torch.randn(8, 4)
    lsquant.prepare(model, Recipe(8, 8), example_inputs=x)
    lsquant.calibrate(model, [x])
    assert "not_integer" not in {f.code for f in lsquant.check(model)}  # it was not asked for
    lsquant.prepare(lsquant.revert(model), Recipe(8, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    (finding,) = [f for f in lsquant.check(model) if f.code == "not_integer"]
    assert (finding.where, finding.severity) == ("1", "note")
    assert "Softmax computes in floating point in the fused network" in finding.message


def test_every_code_is_planted_here():
    source = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_check*.py"))
    assert {severity for severity, _ in CODES.values()} <= set(SEVERITIES)
    for code in CODES:
        assert f'"{code}"' in source, f"no test plants {code}"
