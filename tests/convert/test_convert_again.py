"""prepare again, revert, disabled, the first and the last layer, the recipe of a prepared model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lsquant
from helpers.convert import W4A4, Backwards, Tied, assert_same_state, bits, images, net, ready, state
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import UsageError
from lsquant.nn import ExactAvgPool2d, ExactBatchNorm2d, quantizers

# ---- first and last ----


def test_first_and_last_by_definition_and_by_execution():
    preset, batch = Recipe.preset("w2a2"), torch.randn(2, 4)
    model = Backwards()
    lsquant.prepare(model, preset)
    assert bits(model) == {"last": (8, 8), "middle": (2, 2), "stem": (8, 8)}
    model = Backwards()
    lsquant.prepare(model, Recipe(2, 2, [Rule("first", 7, 6), Rule("last", 5, 4)]), example_inputs=batch)
    assert bits(model) == {"last": (5, 4), "middle": (2, 2), "stem": (7, 6)}
    lsquant.calibrate(model, [batch])


@pytest.mark.parametrize("inputs", [torch.ones(2, 4), (torch.ones(2, 4), "label"), {"x": torch.ones(2, 4)}])
def test_example_inputs_may_be_any_batch(inputs):
    model = Backwards().train()
    lsquant.prepare(model, Recipe(2, 2, [Rule("first", 7)]), example_inputs=inputs)
    assert bits(model)["stem"] == (7, 2)
    assert model.training


def test_calibrate_finds_a_wrong_guess_and_names_both_layers_and_the_remedy():
    model = Backwards()
    lsquant.prepare(model, Recipe(2, 2, [Rule("first", 8)]))
    with pytest.raises(UsageError, match=r"'last' was taken for the first.*'stem' is executed first.*example_inputs"):
        lsquant.calibrate(model, [torch.randn(2, 4)])
    lsquant.prepare(model, Recipe(2, 2, [Rule("last", 8)]))
    with pytest.raises(UsageError, match=r"'stem' was taken for the last .*'last' is executed last.*example_inputs"):
        lsquant.calibrate(model, [torch.randn(2, 4)])


def test_the_order_does_not_matter_where_no_rule_asks_for_it():
    ready(Backwards(), Recipe(2, 2), torch.randn(2, 4))
    ready(Backwards(), Recipe.preset("w2a2", first_last=None), torch.randn(2, 4))


def test_the_order_does_not_matter_after_loading(tmp_path):
    model, batch = Backwards(), torch.randn(2, 4)
    lsquant.prepare(model, Recipe.preset("w2a2"), example_inputs=batch)
    lsquant.calibrate(model, [batch])
    lsquant.save(model, tmp_path / "m")
    other = lsquant.load(Backwards(), tmp_path / "m")
    assert bits(other) == bits(model)
    lsquant.calibrate(other, [batch], again=True)


def test_a_layer_that_is_not_reached_is_neither_first_nor_last():
    class Unused(Backwards):
        def forward(self, x):
            return self.middle(x)

    model = Unused()
    lsquant.prepare(model, Recipe.preset("w2a2"), example_inputs=torch.randn(2, 4))
    assert bits(model) == {"last": (2, 2), "middle": (8, 8), "stem": (2, 2)}


# ---- prepare again ----


def test_other_bits_keep_the_parameter_objects_and_rescale_the_steps():
    model = ready(net(), W4A4, images())
    steps = {name: q.step for name, q in quantizers(model)}
    signs = {name: q.spec.signed for name, q in quantizers(model)}
    with torch.no_grad():
        for step in steps.values():
            step.fill_(0.3)
    for _, q in quantizers(model):
        q.initial_step.fill_(0.2)
    lsquant.prepare(model, Recipe(2, 8), steps="rescale")
    assert bits(model) == {"0": (2, 8), "5": (2, 8)}
    factors = {"weight": 7 / 1, True: 7 / 127, False: 15 / 255}
    assert signs["0.input_quantizer"] is True
    assert signs["5.input_quantizer"] is False
    for name, q in quantizers(model):
        assert q.step is steps[name]
        factor = factors["weight" if "weight" in name else signs[name]]
        assert q.step.item() == pytest.approx(0.3 * factor, rel=1e-6)
        assert q.initial_step.item() == pytest.approx(0.2 * factor, rel=1e-6)
        assert q.is_initialized
        assert q.spec.signed is signs[name]
    model(images())


def test_recalibrate_sets_weight_steps_anew_and_forgets_activation_steps():
    model = ready(net(), W4A4, images())
    steps = {name: q.step for name, q in quantizers(model)}
    with torch.no_grad():
        for step in steps.values():
            step.fill_(9.0)
    lsquant.prepare(model, Recipe(2, 2), steps="recalibrate")
    for name, q in quantizers(model):
        assert q.step is steps[name]
        assert q.is_initialized == ("weight" in name)
    assert model[5].weight_quantizer.step.item() == pytest.approx(2 * model[5].weight.abs().mean().item(), rel=1e-6)
    with pytest.raises(UsageError, match=r"'0\.input_quantizer' has no step yet.*calibrate"):
        model(images())
    lsquant.calibrate(model, [images()])
    model(images())


def test_a_sign_asked_for_later_replaces_the_decided_one():
    model = ready(net(), W4A4, images())
    lsquant.prepare(model, Recipe(4, QuantSpec(4, signed=True)))
    assert model[0].input_quantizer.is_initialized  # it was signed already
    assert not model[5].input_quantizer.is_initialized  # another grid: the step means nothing there
    lsquant.calibrate(model, [images()])
    assert model[5].input_quantizer.q_min == -8


def test_another_granularity_makes_new_steps():
    model = ready(net(), W4A4, images())
    lsquant.prepare(model, Recipe(QuantSpec(4, granularity="channel"), 4))
    quantizer = model[5].weight_quantizer
    expected = 2 * model[5].weight.abs().mean(1) / 7**0.5
    assert quantizer.is_initialized
    assert torch.allclose(quantizer.step, expected, rtol=1e-6, atol=0)
    assert quantizer.gradient_scale == pytest.approx(1 / (16 * 7) ** 0.5, rel=1e-6)
    assert model[5].input_quantizer.is_initialized


@pytest.mark.parametrize("before", [Recipe(None, 4), Recipe(4, None), Recipe(3, QuantSpec(3, offset=True))])
def test_the_order_of_parameters_is_that_of_a_fresh_prepare(before):
    """The state of an optimizer goes by that order; found by the fuzzer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lsquant.prepare(model, before)
    lsquant.prepare(model, Recipe(4, 4))
    sides = ["weight", "bias", "weight_quantizer.step", "input_quantizer.step"]
    assert [name for name, _ in model.named_parameters()] == [f"{layer}.{side}" for layer in (0, 1) for side in sides]


def test_float_again_for_one_layer():
    model = ready(net(), W4A4, images())
    lsquant.prepare(model, Recipe(4, 4, [Rule("0", None, None), Rule("5", activation=None)]))
    assert bits(model) == {"5": (4, None)}
    assert type(model[0]) is nn.Conv2d
    assert set(vars(model[0])) == {*vars(nn.Conv2d(2, 4, 3)), "seen_by_prepare"}
    assert not [key for key in model.state_dict() if key.startswith("0.") and "quantizer" in key]


def test_layers_added_later_are_prepared_too():
    model = ready(net(), W4A4, images())
    model.append(nn.Linear(3, 2))
    lsquant.prepare(model, W4A4)
    assert bits(model) == {"0": (4, 4), "5": (4, 4), "6": (4, 4)}
    assert [q.is_initialized for _, q in quantizers(model)] == [True] * 5 + [False]


# ---- revert ----


def test_revert_gives_the_float_model_back():
    model, x = net(), images()
    model(x)  # running statistics that are not the initial ones
    before, keys, expected = state(model), [type(m) for m in model.modules()], model.eval()(x)
    parameters = dict(model.named_parameters())
    ready(model, W4A4, x)
    assert type(model[1]) is ExactBatchNorm2d
    assert type(model[3]) is ExactAvgPool2d
    assert not torch.equal(model(x), expected)
    assert lsquant.revert(model) is model
    assert torch.equal(model(x), expected)
    assert_same_state(model, before)
    assert [type(m) for m in model.modules()] == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert set(vars(model[0])) == set(vars(nn.Conv2d(2, 4, 3)))


def test_revert_of_tied_and_float_models():
    model = ready(Tied(), W4A4, torch.randn(3, 4))
    lsquant.revert(model)
    assert set(model.state_dict()) == set(Tied().state_dict())
    assert model.one.weight is model.two.weight
    lsquant.revert(model)
    layer = nn.Linear(2, 2)
    assert lsquant.revert(layer) is layer


def test_weights_only_leaves_batchnorm_and_pooling_alone():
    model = net()
    lsquant.prepare(model, Recipe(4))
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[3]) is nn.AvgPool2d
    model = ready(net(), W4A4, images())
    lsquant.prepare(model, Recipe(4))
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[3]) is nn.AvgPool2d


# ---- disabled ----


def test_disabled_is_the_float_model():
    model, x = net().eval(), images()
    expected = model(x)
    ready(model, W4A4, x)
    quantized = model(x)
    with lsquant.disabled(model):
        assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)  # BatchNorm is rounded twice
    assert torch.equal(model(x), quantized)


def test_disabled_by_patterns():
    model = ready(net(), W4A4, images())
    switched = dict(quantizers(model))

    def off(*patterns):
        with lsquant.disabled(model, *patterns):
            return {name for name, q in switched.items() if not q.enabled}

    assert off("5") == {"5.weight_quantizer", "5.input_quantizer"}
    assert off("*.input_quantizer") == {"0.input_quantizer", "5.input_quantizer"}
    assert off("0", "5.weight*") == {"0.weight_quantizer", "0.input_quantizer", "5.weight_quantizer"}
    assert off() == set(switched)
    assert all(q.enabled for q in switched.values())
    with pytest.raises(UsageError, match=r"'1' matches no quantizer"):
        off("5", "1")
    assert all(q.enabled for q in switched.values())


def test_disabled_nests_and_ends_after_an_error():
    model = ready(net(), W4A4, images())
    with pytest.raises(ZeroDivisionError), lsquant.disabled(model, "5"):  # noqa: PT012
        with lsquant.disabled(model):
            pass
        assert not model[5].weight_quantizer.enabled
        assert model[0].weight_quantizer.enabled
        raise ZeroDivisionError
    assert all(q.enabled for _, q in quantizers(model))


# ---- the recipe of a prepared model ----


def test_resolved_recipe_prepares_another_model_equally():
    model = ready(net(), Recipe.preset("w2a4", rules=[Rule("5", weight=QuantSpec(3, granularity="channel"))]), images())
    recipe = lsquant.resolved_recipe(model)
    assert recipe == Recipe.from_toml(recipe.to_toml())
    other = net()
    lsquant.prepare(other, recipe)
    assert bits(other) == bits(model) == {"0": (8, 8), "5": (3, 8)}
    assert other[5].weight_quantizer.step.shape == (3,)
    assert other[0].input_quantizer.spec.signed is None
    assert set(other.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("name", ["conv+", "a(b", "x[0]", "c*d", "q?", "u|v", "back\\slash"])
def test_resolved_recipe_with_unusual_names(name):
    model = nn.ModuleDict({name: nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    lsquant.prepare(model, Recipe(4, 4, [Rule("a", None, None)]))
    other = nn.ModuleDict({name: nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    lsquant.prepare(other, lsquant.resolved_recipe(model))
    assert bits(other) == {name: (4, 4)}


def test_a_rule_for_a_module_that_holds_layers_says_how_to_name_them():
    for rules in ({"skip": ["1"]}, {"rules": [Rule("1", 8, 8)]}):
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
        with pytest.raises(UsageError, match=r"'1'.*holds '1\.0'.*use '1\.\*'"):
            lsquant.prepare(model, Recipe.preset("w4a4", **rules))
    lsquant.prepare(model, Recipe.preset("w4a4", skip="1.*"))  # a string is one name
    assert bits(model) == {"0": (8, 8), "2": (8, 8)}


def test_the_share_of_multiplications():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(72, 5),
        nn.Linear(5, 3),
    )
    recipe = Recipe(4, 4, [Rule("1", activation=None), Rule("4", None, None)])
    changes = lsquant.prepare(model, recipe, example_inputs=torch.randn(1, 2, 7, 7))
    # 4x3x3 outputs of 2x3x3 terms; 4x3x3 inputs spread over 2x2x2; 72x5; 5x3
    assert [c.multiplications for c in changes] == [36 * 18, 36 * 8, 360, 15]
    assert changes.multiplication_share == pytest.approx((648 + 360) / (648 + 288 + 360 + 15))
    assert str(changes).endswith("76.9% of the multiplications (weight and input quantized)")
    assert lsquant.prepare(model, recipe).multiplication_share is None
