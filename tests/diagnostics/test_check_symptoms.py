"""`check`: symptoms of steps, weights, activations and BatchNorm, one planted for each; healthy runs have none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lsquant
from helpers.checked import codes, images, only, trained_cnn
from lsquant import QuantSpec, Recipe, Rule, check
from lsquant.cli import main
from lsquant.tasks import open_run
from lsquant.training import TransitionRate

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_loop_transformer.py"


@pytest.fixture
def cnn():
    return trained_cnn()


@pytest.mark.parametrize("factor, code", [(1 / 100, "step_collapsed"), (100, "step_exploded")])
def test_steps_that_collapse_or_explode(cnn, factor, code):
    model, optimizer, _ = cnn
    assert check(model, optimizer) == []
    with torch.no_grad():
        model.conv.input_quantizer.step.copy_(model.conv.input_quantizer.initial_step * factor)
    (finding,) = check(model, optimizer)
    assert (finding.code, finding.where) == (code, "conv.input_quantizer")
    assert finding.evidence["ratio"] == pytest.approx(factor, rel=1e-5)
    with torch.no_grad():  # within a factor of 16 nothing is said
        model.conv.input_quantizer.step.copy_(model.conv.input_quantizer.initial_step * factor**0.6)
    assert check(model, optimizer) == []


def test_a_step_below_the_guard_is_one_finding(cnn):
    model, optimizer, _ = cnn
    with torch.no_grad():
        model.conv.input_quantizer.step.fill_(0.0)
    assert [f.code for f in check(model, optimizer)] == ["step_below_guard"]


def test_a_step_that_does_not_move(cnn):
    model, optimizer, _ = cnn
    with torch.no_grad():
        model.conv.weight_quantizer.step.copy_(model.conv.weight_quantizer.initial_step)
    only(check(model, optimizer), "step_unmoved", "conv.weight_quantizer")
    for group in optimizer.param_groups:  # the end of a cosine
        group["lr"] = 0.0
    only(check(model, optimizer), "step_unmoved", "conv.weight_quantizer")
    only(check(model), "step_unmoved", "conv.weight_quantizer")  # most others have moved: it was trained
    # an optimizer that has not begun says nothing; without one, neither does a model whose steps are mostly new
    fresh = torch.optim.SGD(lsquant.param_groups(model, 1e-3), momentum=0.9)
    assert check(model, fresh) == []
    with torch.no_grad():
        for _, q in list(lsquant.quantizers(model))[::2]:
            q.step.copy_(q.initial_step)
    assert check(model) == []


def test_steps_that_a_transition_rate_holds_are_no_finding():
    """Of two 2-bit weights both are where they began; once one of them moves, the other is a finding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    lsquant.prepare(model, lsquant.Recipe.preset("w2a4"))
    x = torch.rand(32, 4)
    lsquant.calibrate(model, [x])
    optimizer = torch.optim.SGD(lsquant.param_groups(model, 0.01, low_bit=True), momentum=0.9)
    control = TransitionRate(model, optimizer, steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    held = ["2.weight_quantizer", "4.weight_quantizer"]
    assert not [f for f in check(model, optimizer) if f.code == "step_unmoved"]
    control.close()
    with torch.no_grad():
        model[2].weight_quantizer.step.mul_(1.01)
    assert [f.where for f in check(model, optimizer) if f.code == "step_unmoved"] == held[1:]


def test_data_do_not_hide_what_the_steps_say(cnn):
    """A step that training ruined is named so, not as poor calibration; and BatchNorm behind it is not blamed."""
    model, optimizer, data = cnn
    source = model.conv.input_quantizer
    for factor, code in ((1 / 100, "step_collapsed"), (100, "step_exploded")):
        with torch.no_grad():
            source.step.copy_(source.initial_step * factor)
        found = codes(check(model, optimizer, data))
        assert (code, "conv.input_quantizer") in found
        assert not {c for c, where in found if where == "conv.input_quantizer"} & {"clipped", "unused_levels"}
        assert "stale_batchnorm" not in {c for c, _ in found}


def test_the_remedy_for_weights_is_one_for_weights():
    model = nn.Sequential(nn.Linear(64, 64))
    lsquant.prepare(model, Recipe(QuantSpec(4), None))
    with torch.no_grad():
        model[0].weight_quantizer.step.mul_(1 / 20)
    finding = only(check(model, batches=[torch.randn(4, 64)]), "clipped", "0.weight_quantizer")
    assert "weights='mse', again=True" in finding.remedy
    lsquant.calibrate(model, [torch.randn(4, 64)], weights="mse", again=True)
    assert check(model, batches=[torch.randn(4, 64)]) == []


def test_calibration_is_judged_by_the_values_it_saw():
    """Those of the float model: narrow 2-bit weights in front shrink the values that the rounded model gives."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    data = [torch.randn(64, 32) for _ in range(4)]
    lsquant.prepare(model, Recipe(QuantSpec(2, narrow=True), 4))
    lsquant.calibrate(model, data)
    with torch.no_grad():
        model[0].weight_quantizer.step.mul_(0.25)  # the layer gives a quarter
        model[0].weight_quantizer.initial_step.mul_(0.25)
    assert "calibration_poor" not in {f.code for f in check(model, batches=data)}
    lsquant.calibrate(model, [x * 0.01 for x in data], again=True)
    assert ("calibration_poor", "2.input_quantizer") in codes(check(model, batches=data))


def test_a_learning_rate_that_is_no_good_with_adam(cnn):
    model, _, _ = cnn
    steps = {name: q.step.item() for name, q in lsquant.quantizers(model)}
    rate = 0.2 * sorted(steps.values())[1]  # too much for the smallest two
    found = check(model, torch.optim.AdamW(lsquant.param_groups(model, 1e-3, step_lr=rate)))
    assert codes(found) == {("adam_step_lr", name) for name, step in steps.items() if rate > 0.1 * step}
    assert found[0].evidence["share"] == pytest.approx(rate / steps[found[0].where], rel=1e-5)
    assert check(model, torch.optim.AdamW(lsquant.param_groups(model, 1e-3, step_lr=rate / 1000))) == []
    assert check(model, torch.optim.SGD(lsquant.param_groups(model, 1e-3, step_lr=rate))) == []


def test_fewer_bits_than_asked_for():
    """Weights that were rounded more coarsely before: of the levels between the outermost every fourth occurs."""
    model = nn.Sequential(nn.Linear(16, 64))
    lsquant.prepare(model, Recipe(QuantSpec(4), None))
    q, data = model[0].weight_quantizer, [torch.randn(4, 16)]
    assert check(model, batches=data) == []
    with torch.no_grad():
        q.step.fill_(1.0)
        model[0].weight.copy_(torch.randint(-2, 3, (64, 16)).clamp(-2, 1) * 4 + 0.3)
        model[0].weight[:, 2:] *= 0.01  # so that the step is large for them, as unused levels need
    finding = only(check(model, batches=data), "few_levels", "0.weight_quantizer")
    assert (finding.evidence["used"], finding.evidence["reach"], finding.evidence["bits"]) == (4, 13, 2.0)


def test_inputs_of_few_values_that_lose_much():
    model = nn.Sequential(nn.Linear(8, 4))
    lsquant.prepare(model, Recipe(None, QuantSpec(4, signed=True)))
    two = torch.where(torch.rand(64, 8) < 0.5, -1.3, 1.12)  # between two levels
    lsquant.calibrate(model, [two])
    with torch.no_grad():
        model[0].input_quantizer.step.fill_(0.2)
    finding = only(check(model, batches=[two]), "few_levels", "0.input_quantizer")
    assert (finding.evidence["used"], finding.evidence["bits"]) == (2, 1.0)


def test_signed_values_quantized_unsigned():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    lsquant.prepare(model, Recipe(4, 4, [Rule("0", 4, QuantSpec(4, signed=False))]))
    data = [torch.randn(64, 8)]
    lsquant.calibrate(model, data)
    finding = only(check(model, batches=data), "negative_cut", "0.input_quantizer")
    assert finding.evidence["share"] == (data[0] < 0).double().mean().item()
    assert finding.evidence["lowest"] == data[0].min().item()
    assert check(model, batches=[data[0].abs()]) == []


def test_dead_channels(cnn):
    model, optimizer, data = cnn
    with torch.no_grad():
        model.conv.weight[:2] = 1e-4
    assert check(model, optimizer, data) == []  # a quarter of the channels is not more than a quarter
    with torch.no_grad():
        model.conv.weight[2] = 0.0
    finding = only(check(model, optimizer, data), "dead_channels", "conv.weight_quantizer")
    assert finding.evidence == {"dead": 3, "channels": 8}


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_oscillating_weights(granularity):
    model = nn.Sequential(nn.Linear(64, 32))
    size = 16 if granularity == "group" else None
    lsquant.prepare(model, Recipe(QuantSpec(4, granularity=granularity, group_size=size), None))
    data, q = [torch.randn(4, 64)], model[0].weight_quantizer
    assert check(model, batches=data) == []
    with torch.no_grad():
        at = (torch.randint(-8, 7, (32, 64)) + 0.5 + 0.004 * torch.randn(32, 64)).reshape(q.step.numel(), -1)
        at = (at * q.step[:, None]).reshape(32, 64)
        model[0].weight[:8] = at[:8]  # a quarter of them
    finding = only(check(model, batches=data), "oscillating", "0.weight_quantizer")
    assert 0.2 < finding.evidence["share"] < 0.35


def test_stale_batchnorm(cnn):
    model, optimizer, data = cnn
    before = model.bn.running_mean.clone()
    model.bn.running_mean += 2.0 * model.bn.running_var.sqrt()
    finding = only(check(model, optimizer, data), "stale_batchnorm", "bn")
    assert finding.evidence["shift"] == pytest.approx(2.0, abs=0.3)
    model.bn.running_mean.copy_(before)
    assert check(model, optimizer, data) == []
    model.bn.running_var *= 9.0
    assert only(check(model, optimizer, data), "stale_batchnorm", "bn").evidence["spread"] == pytest.approx(
        9.0, rel=0.3
    )


def test_too_little_calibration_data():
    """One sample, evenly spread: the tails of the others are clipped, not so many that this is a finding."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    lsquant.prepare(model, Recipe(None, 4))
    data = [torch.randn(64, 16) for _ in range(3)]
    lsquant.calibrate(model, [torch.linspace(-1.35, 1.35, 16)[None]])
    found = {f.where: f for f in check(model, batches=data) if f.code == "calibration_poor"}
    assert "0.input_quantizer" in found
    step, best = (found["0.input_quantizer"].evidence[key] for key in ("step", "best"))
    assert step < 0.7 * best
    lsquant.calibrate(model, data, again=True)
    assert check(model, batches=data) == []
    with torch.no_grad():  # after training the step is the loss's affair
        model[0].input_quantizer.step.mul_(0.75)
    assert "calibration_poor" not in {f.code for f in check(model, batches=data)}


def test_three_healthy_runs(tmp_path):
    """A CNN, and runs of the example transformer at 3 and 8 bits: no finding, with optimizer, data and all."""
    model, optimizer, data = trained_cnn()
    assert check(model, optimizer, [*data, *images()]) == []
    for bits in (3, 8):
        out = tmp_path / str(bits)
        short = ["--float-epochs", "1", "--epochs", "1", "--threads", "1", "--quiet"]
        assert main(["train", f"{EXAMPLE}:task", "--bits", str(bits), "--out", str(out), *short]) == 0
        run = open_run(out, f"{EXAMPLE}:task")
        assert check(run.model(), batches=run.task.batches("calibration", batch_size=64)) == []
