"""The buffer ``bounds``: a state of other bits is refused by name, a state of an earlier version is read."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lsquant
from helpers.quantizers import VARIETIES, ready, varieties
from lsquant import Quantizer, QuantSpec, Recipe
from lsquant.nn import quantizers


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def calibrated(recipe: Recipe) -> nn.Sequential:
    model = net()
    lsquant.prepare(model, recipe)
    lsquant.calibrate(model, [torch.randn(64, 8)])
    return model


def bounds(q: Quantizer) -> list[int]:
    assert q.bounds.dtype == torch.int32
    return q.bounds.tolist()


# ---- they are those of the codes ----


@pytest.mark.parametrize(
    "spec, positive, negative",
    [
        (QuantSpec(4), [0, 15], [-8, 7]),
        (QuantSpec(2, signed=True), [-2, 1], [-2, 1]),
        (QuantSpec(2, narrow=True), [-1, 1], [-1, 1]),
        (QuantSpec(8, signed=False), [0, 255], [0, 255]),
        (QuantSpec(3, offset=True), [0, 7], [0, 7]),
    ],
)
def test_they_follow_the_sign(spec: QuantSpec, positive: list[int], negative: list[int]) -> None:
    q = Quantizer(spec, count=3)
    assert bounds(q) == ([0, 0] if spec.signed is None else positive)
    q.initialize(torch.tensor([0.3, 0.5, 2.0]))
    assert bounds(q) == [q.q_min, q.q_max] == positive
    q.initialize(torch.tensor([0.3, -0.5, 2.0]))
    assert bounds(q) == [q.q_min, q.q_max] == negative
    other = Quantizer(spec, count=3)
    other.adopt(q)
    assert bounds(other) == negative


def test_they_follow_other_bits() -> None:
    model = calibrated(Recipe(4, 4))
    for steps, wanted in (("rescale", [[-2, 1], [-2, 1]]), ("recalibrate", [[-2, 1], [0, 0]])):
        other = copy.deepcopy(model)
        lsquant.prepare(other, Recipe(2, 2), steps=steps)  # type: ignore[arg-type]
        assert [bounds(other[0].weight_quantizer), bounds(other[0].input_quantizer)] == wanted


@varieties
@pytest.mark.parametrize("move", [lambda q: q.half(), lambda q: q.to(torch.bfloat16), copy.deepcopy])
def test_they_stay_what_they_are(variety: str, move: Any) -> None:
    q = ready(**VARIETIES[variety])
    wanted = [q.q_min, q.q_max]
    assert bounds(move(q)) == wanted


def test_an_average_of_models_has_them() -> None:
    model = calibrated(Recipe(4, 2))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    other = calibrated(Recipe(4, 2))
    other.load_state_dict(average.module.state_dict())
    assert all(bounds(q) == [q.q_min, q.q_max] for _, q in quantizers(other))
    assert lsquant.check(average.module) == []


# ---- a state of something else ----


OTHERS = {
    "bits": (Recipe(2, 4), Recipe(4, 4), r"'0\.weight_q.* -2 to 1 \(2 bit\), the model -8 to 7 \(4 bit, signed"),
    "bits of inputs": (Recipe(4, 8), Recipe(4, 4), r"'2\.input_quantizer'.* 0 to 255 \(8 bit\), the model 0 to 15"),
    "narrow": (Recipe(QuantSpec(2, narrow=True)), Recipe(2), r"-1 to 1 \(2 bit\), the model -2 to 1"),
    "sign": (
        Recipe(4, QuantSpec(4, signed=True)), Recipe(4, QuantSpec(4, signed=False)),
        r"'0\.input_quantizer': the state has the codes -8 to 7 \(4 bit\), the model 0 to 15",
    ),
    "granularity": (
        Recipe(QuantSpec(4, granularity="channel")), Recipe(4),
        r"'0\.weight_quantizer': size mismatch: the state has a step of shape \(16,\), the model one of shape \(1,\) "
        r"\(4 bit, signed, per tensor\)",
    ),
    "groups": (
        Recipe(QuantSpec(4, granularity="group", group_size=4)), Recipe(QuantSpec(4, granularity="channel")),
        r"\(32,\), the model one of shape \(16,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("what", OTHERS)
def test_a_state_of_another_recipe_names_both(what: str, assign: bool, strict: bool) -> None:
    theirs, mine, says = OTHERS[what]
    source, model = calibrated(theirs), calibrated(mine)
    steps = {name: q.step.clone() for name, q in quantizers(model)}
    with pytest.raises(RuntimeError, match=says) as caught:
        model.load_state_dict(source.state_dict(), strict=strict, assign=assign)
    assert "recipe that the state was made with" in str(caught.value)
    for name, q in quantizers(model):  # where it does not fit, nothing of it is taken
        if f"quantizer {name!r}" in str(caught.value):
            assert torch.equal(q.step, steps[name])
            assert bounds(q) == [q.q_min, q.q_max]


def test_the_sign_that_calibration_decided_is_no_difference() -> None:
    model = calibrated(Recipe(4, 4))
    other = net()
    lsquant.prepare(other, Recipe(4, 4))
    lsquant.calibrate(other, [torch.rand(64, 8)])  # unsigned, the state is signed
    assert bounds(other[0].input_quantizer) == [0, 15]
    other.load_state_dict(model.state_dict())
    assert bounds(other[0].input_quantizer) == [-8, 7]
    x = torch.randn(5, 8)
    assert torch.equal(other(x), model(x))


# ---- a state of an earlier version ----


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_without_bounds_is_read(assign: bool) -> None:
    model = calibrated(Recipe(3, 5))
    old = OrderedDict((k, v.clone()) for k, v in model.state_dict().items() if not k.endswith(".bounds"))
    other = net()
    lsquant.prepare(other, Recipe(3, 5))
    keys = other.load_state_dict(old, strict=True, assign=assign)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert all(bounds(q) == [q.q_min, q.q_max] for _, q in quantizers(other))
    assert "0.weight_quantizer.bounds" not in old
    x = torch.randn(5, 8)
    assert torch.equal(other(x), model(x))


def test_types_of_a_state_that_is_assigned_do_not_reach_the_steps() -> None:
    model = calibrated(Recipe(4, 4))
    state = {name: t.bfloat16() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    other = net()
    lsquant.prepare(other, Recipe(4, 4))
    other.load_state_dict(state, assign=True)
    assert other[0].weight.dtype == torch.bfloat16
    for _, q in quantizers(other):
        assert q.step.dtype == q.initial_step.dtype == torch.float32


# ---- the meta device ----


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        model = net()
    lsquant.prepare(model, Recipe(4, 4))
    return model


def test_a_state_assigned_to_a_model_on_the_meta_device() -> None:
    model, other, x = calibrated(Recipe(4, 4)), on_meta(), torch.randn(5, 8)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(x), model(x))
    assert not [name for name, t in (*other.named_parameters(), *other.named_buffers()) if t.is_meta]
    other.to("cpu").train()(x).sum().backward()
    assert lsquant.check(other) == []
    assert {name: (q.spec, q.elements_per_step) for name, q in quantizers(other)} == {
        name: (q.spec, q.elements_per_step) for name, q in quantizers(model)
    }


def test_a_state_copied_to_a_model_that_got_memory() -> None:
    model, other, x = calibrated(Recipe(4, 4)), on_meta(), torch.randn(5, 8)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert [int(q.guarded) for _, q in quantizers(other)] == [0] * 4
    assert lsquant.check(other) == []


def test_check_of_a_model_without_values_says_so() -> None:
    (found,) = lsquant.check(on_meta())
    assert (found.code, found.severity) == ("on_meta", "error")
    assert "'0.weight'" in found.message


def test_load_save_and_calibrate_of_a_model_without_values_are_refused(tmp_path) -> None:
    lsquant.save(calibrated(Recipe(4, 4)), tmp_path / "m")
    with torch.device("meta"):
        model = net()
    with pytest.raises(lsquant.UsageError, match=r"'0\.weight' the first, are on the meta device.*to_empty"):
        lsquant.load(model, tmp_path / "m")
    assert type(model[0]) is nn.Linear
    with pytest.raises(lsquant.UsageError, match=r"save: '0\.weight' is on the meta device"):
        lsquant.save(on_meta(), tmp_path / "n")
    with pytest.raises(lsquant.UsageError, match=r"calibrate: '0\.weight' is on the meta device"):
        lsquant.calibrate(on_meta(), [torch.randn(2, 8)])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    lsquant.load(model.to_empty(device="cpu"), tmp_path / "m")
    assert torch.isfinite(model(torch.randn(2, 8))).all()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("theirs", [True, False])
def test_a_state_with_an_offset_is_that_of_another_recipe(theirs: bool, strict: bool) -> None:
    """Both have the codes 0 to 15; with strict=False PyTorch alone would drop the offset, or keep the model's own."""

    def ready(offset: bool) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4))
        lsquant.prepare(model, lsquant.Recipe(4, QuantSpec(4, offset=offset)))
        lsquant.calibrate(model, [torch.rand(8, 4) + 1.0])
        return model

    model, other = ready(not theirs), ready(theirs)
    before = {name: t.clone() for name, t in model.state_dict().items() if "input_quantizer" in name}
    with pytest.raises(RuntimeError, match=r"'0\.input_quantizer': the (state|model) has an offset, the"):
        model.load_state_dict(other.state_dict(), strict=strict)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
