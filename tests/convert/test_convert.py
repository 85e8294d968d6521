"""prepare and revert in place: what is kept, what is shared, what is said about layers that stay float."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lsquant
from helpers.convert import W4A4, Tied, assert_same_state, bits, images, net, ready, state
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import UsageError
from lsquant.nn import ExactBatchNorm2d, QuantConv2d, QuantLinear, quantizers

KEYS = {"step", "initial_step", "signed", "count", "initialized", "bounds"}


# ---- in place ----


def test_parameters_buffers_and_references_are_kept():
    model = net()
    conv, parameters, before = model[0], dict(model.named_parameters()), state(model)
    lsquant.prepare(model, W4A4)
    assert model[0] is conv
    assert type(conv) is QuantConv2d
    assert type(model[1]) is ExactBatchNorm2d
    assert type(model[5]) is QuantLinear
    assert isinstance(conv, nn.Conv2d)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert {n.rpartition(".")[2] for n in after.keys() - parameters.keys()} == {"step"}
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_the_keys_of_the_state_dict():
    model = net()
    floats = set(model.state_dict())
    lsquant.prepare(model, Recipe(4, QuantSpec(4, offset=True), [Rule("5", activation=None)]))
    expected = {f"{n}.weight_quantizer.{key}" for n in "05" for key in KEYS}
    expected |= {f"0.input_quantizer.{key}" for key in KEYS | {"offset"}}
    assert set(model.state_dict()) - floats == expected
    assert floats < set(model.state_dict())


def test_hooks_and_attributes_survive():
    model, calls = net(), []
    model[5].register_forward_hook(lambda *_: calls.append("hook"))
    model[5].colour = "blue"
    ready(model, W4A4, images())
    calls.clear()
    model(images())
    assert calls == ["hook"]
    assert model[5].colour == "blue"


def test_the_root_may_be_the_layer():
    layer = nn.Linear(4, 2)
    lsquant.prepare(layer, W4A4)
    assert type(layer) is QuantLinear
    assert set(layer.state_dict()) == {"weight", "bias"} | {
        f"{kind}_quantizer.{key}" for kind in ("weight", "input") for key in KEYS
    }
    assert [name for name, _ in quantizers(layer)] == ["weight_quantizer", "input_quantizer"]
    lsquant.calibrate(layer, [torch.randn(3, 4)])
    assert lsquant.resolved_recipe(layer).resolve([""], layer)[:2] == (QuantSpec(4, signed=True), QuantSpec(4))


def test_a_module_used_twice_has_one_pair_of_quantizers():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    changes = lsquant.prepare(model, Recipe(4, 4, [Rule("2", weight=3)]))  # its second name
    assert [c.name for c in changes] == ["0"]
    assert bits(model) == {"0": (3, 4)}
    assert model[0] is model[2] is shared
    lsquant.calibrate(model, [torch.randn(5, 4)])
    assert shared.input_quantizer.spec.signed is True


def test_tied_weights_share_a_quantizer():
    model = ready(Tied(), W4A4, torch.randn(3, 4))
    assert model.one.weight_quantizer is model.two.weight_quantizer
    assert model.one.input_quantizer is not model.two.input_quantizer
    assert len(list(quantizers(model))) == 3
    for steps, ratio in (("rescale", 7.0), ("recalibrate", None)):
        step = model.one.weight_quantizer.step
        old = step.detach().clone()
        lsquant.prepare(model, Recipe(2 if ratio else 4, 4), steps=steps)
        assert model.one.weight_quantizer is model.two.weight_quantizer
        assert model.one.weight_quantizer.step is step
        assert model.one.weight_quantizer.name == "one.weight_quantizer"
        if ratio:
            assert step.item() == pytest.approx(old.item() * ratio, rel=1e-6)
        else:
            assert step.item() == pytest.approx(2 * model.one.weight.abs().mean().item() / 7**0.5, rel=1e-6)


@pytest.mark.parametrize("ones", [Rule("one", weight=2), Rule("one", weight=None)])
def test_conflicting_rules_for_tied_weights_name_both_layers(ones):
    model = Tied()
    with pytest.raises(UsageError, match=r"'one' and 'two' share one weight.*give both the same rule"):
        lsquant.prepare(model, Recipe(4, 4, [ones, Rule("two", weight=8)]))
    assert type(model.one) is type(model.two) is nn.Linear
    lsquant.prepare(model, Recipe(4, 4, [Rule("two", activation=8)]))  # inputs may differ


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("weight", [8, None])
def test_the_most_explicit_rule_decides_about_a_tied_weight(name, weight):
    model, batch = Tied(), torch.randn(3, 4)
    lsquant.prepare(model, Recipe.preset("w2a2", rules=[Rule(name, weight=weight)]))  # over the preset's 8 for the ends
    assert bits(model) == {"one": (weight, 8), "two": (weight, 8)}
    model = Tied()
    lsquant.prepare(model, Recipe(2, 2, [Rule("two", weight=5)]), example_inputs=batch)  # over the default
    assert bits(model) == {"one": (5, 2), "two": (5, 2)}


def test_a_tied_weight_counts_once():
    model = nn.Sequential(Tied(), nn.Linear(4, 8))
    changes = lsquant.prepare(model, Recipe(4, 4, [Rule("1", None, None)]))
    assert [c.shares for c in changes] == [None, "0.one", None]
    assert changes.weight_share == 16 / (16 + 32)
    assert "shares its weight with '0.one'" in str(changes).splitlines()[2]
    assert str(changes).endswith("2 layers quantized, 33.3% of the weights")


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    model = ready(net(), W4A4, images()).eval()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = images()
    expected = model(x)
    assert torch.equal(other(x), expected)
    assert_same_state(other, state(model))
    with torch.no_grad():
        other[5].weight_quantizer.step.mul_(2.0)
    assert not torch.equal(other(x), expected)
    assert torch.equal(model(x), expected)


def test_modes_are_kept():
    model = net()
    model[5].eval()
    lsquant.prepare(model, W4A4)
    assert model.training
    assert not model[5].training
    assert not model[5].weight_quantizer.training
    assert model[0].weight_quantizer.training


# ---- Changes ----


class MyLinear(nn.Linear):
    pass


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quantized = nn.Linear(4, 5)
        self.skipped = nn.Linear(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.lstm = nn.LSTM(4, 3)
        self.mine = MyLinear(4, 4)
        self.words = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.pool = nn.AvgPool2d(2, ceil_mode=True)


def test_changes_say_what_stays_float_and_why():
    changes = lsquant.prepare(Mixed(), Recipe(4, 8, [Rule("skipped", None, None)]))
    rows = {c.name: c for c in changes}
    assert (rows["quantized"].weight, rows["quantized"].activation) == (
        "4 bit, signed, per tensor", "8 bit, sign undecided, per tensor",
    )  # fmt: skip
    assert {name: c.kind for name, c in rows.items()} == {
        "quantized": "Linear", "skipped": "Linear", "attention": "MultiheadAttention",
        "attention.out_proj": "NonDynamicallyQuantizableLinear", "lstm": "LSTM", "mine": "MyLinear",
        "words": "Embedding", "pool": "AvgPool2d",
    }  # fmt: skip
    reasons = {
        "quantized": "", "skipped": "the recipe leaves it", "attention": "computes with its weights directly",
        "attention.out_proj": "subclass of Linear", "lstm": "computes with its weights directly",
        "mine": "a subclass of Linear may compute otherwise", "words": "", "pool": "ceil_mode",
    }  # fmt: skip
    for name, reason in reasons.items():
        assert reason in rows[name].reason
        assert bool(reason) == bool(rows[name].reason)
        assert (rows[name].weight == "float") == (name not in ("quantized", "words"))
    assert rows["words"].activation == "float"  # indices are no numbers
    assert [c.name for c in changes.quantized] == ["quantized", "words"]
    weights = {"skipped": 20, "attention": 48 + 12, "attention.out_proj": 16 + 4, "mine": 20}
    assert {name: rows[name].weights for name in ("quantized", "skipped", "words")} == {
        "quantized": 20, "skipped": 20, "words": 28,
    }  # fmt: skip
    total = 48 + sum(weights.values()) + sum(p.numel() for p in Mixed().lstm.parameters())
    assert changes.weight_share == pytest.approx(48 / total, abs=0.01)


def test_changes_print_as_a_table():
    changes = lsquant.prepare(net(), Recipe(4, 4, [Rule("0", weight=None)]))
    lines = str(changes).splitlines()
    assert lines[0].split() == ["layer", "type", "weight", "input", "weights", "note"]
    assert [line.split()[:2] for line in lines[1:-1]] == [["0", "Conv2d"], ["5", "Linear"]]
    assert changes.weight_share == 48 / (48 + 72)
    assert lines[-1] == "2 layers quantized, 40.0% of the weights"


def test_using_changes_as_a_model_is_an_error():
    changes = lsquant.prepare(net(), W4A4)
    for use in (
        lambda: changes(images()),
        lambda: changes.parameters(),
        lambda: changes.eval(),
        lambda: changes.state_dict(),
        lambda: changes.to("cpu"),
    ):
        with pytest.raises(UsageError, match="prepare works in place"):
            use()
    assert not hasattr(changes, "no_such_thing")
    assert len(copy.deepcopy(changes)) == len(pickle.loads(pickle.dumps(changes))) == 2


# ---- errors leave the model unchanged ----


@pytest.mark.parametrize(
    "recipe, says",
    [
        (Recipe(4, 4, [Rule("conv", 8)]), r"'conv' matches no layer; near names: .*0"),
        (Recipe(4, 4, [Rule(nn.LSTM, 8)]), r"LSTM.*matches no layer"),
        (Recipe(4, 4, [Rule("re:6", None, None)]), r"'re:6' matches no layer"),
        (Recipe(QuantSpec(4, granularity="group", group_size=9), 4), r"layer '5': group_size=9 .*16 weights"),
        (Recipe(QuantSpec(4, granularity="group", group_size=16), 4), r"layer '0': group_size=16 .*18 weights"),
    ],
)
def test_a_failed_prepare_changes_nothing(recipe, says):
    model = net()
    before, types = state(model), [type(m) for m in model.modules()]
    with pytest.raises(UsageError, match=says):
        lsquant.prepare(model, recipe)
    assert_same_state(model, before)
    assert [type(m) for m in model.modules()] == types
    lsquant.prepare(model, Recipe(3, 3))
    before = state(model)
    with pytest.raises(UsageError, match=says):
        lsquant.prepare(model, recipe)
    assert_same_state(model, before)
    assert bits(model) == {"0": (3, 3), "5": (3, 3)}


def test_near_names_are_listed():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(UsageError, match=r"'encodr' matches no layer; near names: encoder, decoder"):
        lsquant.prepare(model, Recipe(4, 4, [Rule("encodr", 8)]))


def test_a_skip_of_something_that_stays_float_anyway_is_no_error():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2))
    lsquant.prepare(model, Recipe.preset("w4", skip=["0", nn.Embedding], first_last=None))
    assert bits(model) == {"1": (4, None)}


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((nn.ReLU(), W4A4), "ReLU has no layer that can be quantized"),
        ((net().state_dict(), W4A4), "OrderedDict, not an nn.Module"),
        ((net(), "w4a4"), "Recipe.preset"),
    ],
)
def test_wrong_arguments(arguments, says):
    with pytest.raises(UsageError, match=says):
        lsquant.prepare(*arguments)


def test_a_wrong_word_for_steps():
    with pytest.raises(UsageError, match="steps='keep'"):
        lsquant.prepare(net(), W4A4, steps="keep")


def test_example_inputs_that_do_not_fit_change_nothing():
    model = net()
    with pytest.raises(RuntimeError):
        lsquant.prepare(model, W4A4, example_inputs=torch.randn(1, 5, 4, 4))
    assert type(model[0]) is nn.Conv2d
    assert not model[0]._forward_pre_hooks
    assert model.training


def test_quantizers_are_made_where_the_layer_is_whatever_the_default_device():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.device("meta"):
        lsquant.prepare(model, Recipe.preset("w4a4"))
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    assert model[1].weight_quantizer.is_initialized
