"""Recipes: presets by name, rules and their order, TOML round trip, refusals."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from typing import Any

import pytest
from torch import nn

from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import UsageError

LINEAR = nn.Linear(4, 4)


def weights(bits: int, **more: Any) -> QuantSpec:
    return QuantSpec(bits, signed=True, **more)


def groups(bits: int, size: int) -> QuantSpec:
    return weights(bits, granularity="group", group_size=size)


def bits(recipe: Recipe, name: str, layer: nn.Module = LINEAR, position: tuple[str, ...] = ()) -> tuple[Any, Any]:
    weight, activation, _ = recipe.resolve([name], layer, position)
    return weight and weight.bits, activation and activation.bits


# ---- presets ----

PRESETS = {
    "w4": (weights(4), None),
    "w4a16": (weights(4), None),
    "w4a32": (weights(4), None),
    "w2a2": (weights(2), QuantSpec(2)),
    "w4a4": (weights(4), QuantSpec(4)),
    "W4A8": (weights(4), QuantSpec(8)),
    "W8A8": (weights(8), QuantSpec(8)),
    "w4g32": (groups(4, 32), None),
    "w3g128a8": (groups(3, 128), QuantSpec(8)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_parsed_in_any_case(name):
    recipe = Recipe.preset(name)
    assert (recipe.weight, recipe.activation) == PRESETS[name]
    assert recipe.rules == ()


@pytest.mark.parametrize(
    "name", ["", "w", "a4", "w4a", "4", "w4a4a4", "int4", "w4 a4", "w-4", "w4b4", "w4g32g32", "xw4", "w4a4 ", None, 4]
)
def test_wrong_names_list_the_right_ones(name):
    with pytest.raises(UsageError, match=r"w2a2.*w4g32") as caught:
        Recipe.preset(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["w1", "w1a4", "w4a1", "w9a9", "w4a9", "w16a16", "w0"])
def test_bits_out_of_range_are_refused(name):
    with pytest.raises(UsageError, match=r"bits must be an integer from 2 to 8"):
        Recipe.preset(name)


@pytest.mark.parametrize(
    "preset, arguments, first, middle",
    [
        ("w2a2", {}, (8, 8), (2, 2)),
        ("w4", {}, (8, None), (4, None)),
        ("w2a2", {"first_last": 4}, (4, 4), (2, 2)),
        ("w2a2", {"first_last": None}, (2, 2), (2, 2)),
    ],
)
def test_first_and_last(preset, arguments, first, middle):
    recipe = Recipe.preset(preset, **arguments)
    assert bits(recipe, "x", position=("first",)) == first
    assert bits(recipe, "x", position=("last",)) == first
    assert bits(recipe, "x", position=("first", "last")) == first
    assert bits(recipe, "x") == middle


def test_a_recipe_by_hand_has_no_rule_for_first_and_last():
    recipe = Recipe(4, 4)
    assert recipe.all_rules() == ()
    assert bits(recipe, "x", position=("first",)) == (4, 4)
    assert bits(Recipe(), "x") == (None, None)
    assert Recipe(weight=4).weight == weights(4)
    assert Recipe(activation=4).activation == QuantSpec(4)
    assert Recipe(QuantSpec(4, narrow=True)).weight == QuantSpec(4, signed=True, narrow=True)


# ---- rules ----


class Special(nn.Linear):
    pass


@pytest.mark.parametrize(
    "which, name, layer, hit",
    [
        ("stem.*", "stem.conv", LINEAR, True),
        ("stem.*", "stem", LINEAR, False),
        ("stem.*", "my.stem.conv", LINEAR, False),
        ("*.conv?", "block.0.conv1", LINEAR, True),
        ("*.conv[12]", "block.0.conv3", LINEAR, False),
        ("Stem", "stem", LINEAR, False),
        ("re:stem", "stem.conv", LINEAR, False),
        (r"re:block\.\d+\.conv1", "block.12.conv1", LINEAR, True),
        (r"re:block\.\d+\.conv1", "blockx12.conv1", LINEAR, False),
        (nn.Linear, "x", LINEAR, True),
        (nn.Linear, "x", Special(2, 2), True),
        (Special, "x", LINEAR, False),
        (nn.Conv2d, "x", LINEAR, False),
        (nn.Module, "x", LINEAR, True),
    ],
)
def test_what_a_rule_matches(which, name, layer, hit):
    assert Rule(which, 8).matches([name], layer) is hit


def test_first_and_last_are_positions_and_not_names():
    assert not Rule("first", 8).matches(["first"], LINEAR)
    assert Rule("re:first", 8).matches(["first"], LINEAR)
    assert Rule("last", 8).matches(["x"], LINEAR, ["first", "last"])
    assert not Rule("last", 8).matches(["x"], LINEAR, ["first"])


def test_every_name_of_a_layer_counts():
    assert Rule("head", 8).matches(["tail", "head"], LINEAR)


def test_the_first_rule_that_sets_a_half_wins_for_that_half():
    rules = [Rule("a.b", activation=6), Rule("a.*", weight=3), Rule("*", weight=8, activation=8)]
    recipe = Recipe(2, 2, rules)
    assert bits(recipe, "a.b") == (3, 6)
    assert bits(recipe, "a.c") == (3, 8)
    assert bits(recipe, "z") == (8, 8)
    assert bits(Recipe(2, 5, rules[:2]), "z") == (2, 5)
    assert bits(Recipe(2, 2, [Rule("*", weight=8), Rule("*", weight=3)]), "z") == (8, 2)


def test_none_in_a_rule_is_floating_point_and_not_the_default():
    recipe = Recipe(2, 2, [Rule("head", weight=None), Rule("head", weight=8, activation=None)])
    assert bits(recipe, "head") == (None, None)
    assert bits(Recipe(2, 2, [Rule("head", activation=None)]), "head") == (2, None)


def test_users_rules_come_before_the_presets():
    recipe = Recipe.preset("w2a2", rules=[Rule("stem", weight=4)])
    assert bits(recipe, "stem", position=("first",)) == (4, 8)
    assert bits(recipe, "other", position=("first",)) == (8, 8)


def test_skip_takes_names_globs_and_classes():
    recipe = Recipe.preset("w4a4", skip=["lm_head", "enc.*", nn.Conv2d])
    for name, layer in (("lm_head", LINEAR), ("enc.0", LINEAR), ("x", nn.Conv2d(1, 1, 1))):
        assert bits(recipe, name, layer, ("last",)) == (None, None)
    assert bits(recipe, "x") == (4, 4)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Rule(3, 8), r"which=3"),
        (lambda: Rule(None, 8), r"which=None"),
        (lambda: Rule(int, 8), r"int is not a layer class"),
        (lambda: Rule("re:(", 8), r"not a regular expression"),
        (lambda: Rule("x", weight=1), "weight=1: give bits"),
        (lambda: Rule("x", activation=9), "activation=9: give bits"),
        (lambda: Rule("x", weight="four"), r"weight='four'"),
        (lambda: Rule("x", weight=True), r"weight=True"),
        (lambda: Rule("x", weight=4.0), r"weight=4.0"),
        (lambda: Rule("x", weight=QuantSpec(4, offset=True)), r"weights are symmetric"),
        (lambda: Rule("x", activation=QuantSpec(4, granularity="channel")), r"one step"),
        (lambda: Recipe("inherit"), r"weight='inherit'"),
        (lambda: Recipe(4, 4, ["head"]), r"'head'.*not a Rule"),
        (lambda: Recipe(4, 4, preset_rules=[4]), r"preset_rules holds 4"),
    ],
)
def test_wrong_arguments_are_refused_on_construction(make, says):
    with pytest.raises(UsageError, match=says):
        make()


def test_frozen_and_equal_by_value():
    recipe, rule = Recipe.preset("w4a4"), Rule("x", 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.weight = None  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.weight = None  # type: ignore[misc]
    given = [rule]
    kept = Recipe(4, 4, given)
    given.append(Rule("y", 2))
    assert kept.rules == (rule,)
    assert recipe == Recipe.preset("W4A4") != Recipe.preset("w4a8")
    assert len({recipe, Recipe.preset("W4A4")}) == 1


# ---- TOML ----

SPECS = [
    QuantSpec(2),
    QuantSpec(3, signed=True),
    QuantSpec(4, signed=False),
    QuantSpec(5, narrow=True),
    QuantSpec(6, offset=True),
    QuantSpec(7, signed=True, offset=True),
    QuantSpec(8),
]
WEIGHT_SPECS = [
    QuantSpec(2, narrow=True),
    QuantSpec(4, granularity="channel"),
    QuantSpec(4, granularity="group", group_size=16),
    QuantSpec(3, signed=False),
]
RECIPES = [
    Recipe(),
    *(Recipe.preset(name) for name in PRESETS),
    *(Recipe(4, spec) for spec in SPECS),
    *(Recipe(spec, None) for spec in WEIGHT_SPECS),
    Recipe.preset("w2a2", first_last=3, skip=["a", nn.Conv2d], rules=[Rule('x.["é"]*', weight=4)]),
    Recipe(4, 4, [Rule("a", None), Rule("b", activation=None), Rule("c", None, None), Rule("d"), Rule("last", 8, 8)]),
    Recipe(None, None, [Rule("x.*", WEIGHT_SPECS[2], SPECS[4])]),
]


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_toml_round_trip(number):
    recipe = RECIPES[number]
    text = recipe.to_toml()
    assert tomllib.loads(text)["format"] == 1
    assert Recipe.from_toml(text) == recipe
    assert Recipe.from_toml(text).to_toml() == text


def test_the_literal_file():
    recipe = Recipe.preset("w2a2", rules=[Rule("stem", weight=QuantSpec(4, granularity="channel"))])
    assert tomllib.loads(recipe.to_toml()) == {
        "format": 1,
        "weight": {"bits": 2, "signed": True},
        "activation": {"bits": 2},
        "rules": [{"which": "stem", "weight": {"bits": 4, "signed": True, "granularity": "channel"}}],
        "preset_rules": [
            {"which": which, "weight": {"bits": 8, "signed": True}, "activation": {"bits": 8}}
            for which in ("first", "last")
        ],
    }


def test_plain_bits_and_float_may_be_written_by_hand():
    text = 'format = 1\nweight = 4\nactivation = "float"\n[[rules]]\nwhich = "head"\nweight = 8\nactivation = "float"\n'
    assert Recipe.from_toml(text) == Recipe(4, None, [Rule("head", 8, None)])
    assert Recipe.from_toml("") == Recipe()


@pytest.mark.parametrize(
    "text, says",
    [
        ("weight = ", "not valid TOML"),
        ("wieght = 4", "unknown key 'wieght'.*activation"),
        ("format = 2", "format 2.*update"),
        ('format = "1"', "format '1'"),
        ("weight = 1", "weight=1: give bits"),
        ("weight = [4]", r"weight=\[4\]"),
        ("weight = 4.0", "weight=4.0"),
        ('weight = "inherit"', "inherit"),
        ("weight = {bits = 4, sigend = true}", "unknown field 'sigend'"),
        ("weight = {signed = true}", "'bits' is missing"),
        ("activation = {bits = 4, granularity = 'channel'}", "one step"),
        ("[[rules]]\nweight = 4", "'which'"),
        ("[[rules]]\nwhich = 'x'\nbits = 4", "'which'"),
        ("[[rules]]\nwhich = 3\nweight = 4", r"rules\[0\]\.which is 3; needed is a text"),
        ("rules = 3", "rules"),
        ("rules = ['x']", "rule"),
        ("[rules]\nwhich = 'x'", "rule"),
    ],
)
def test_wrong_files_are_refused(text, says):
    with pytest.raises(UsageError, match=says):
        Recipe.from_toml(text)


def test_a_newer_format_is_said_before_its_keys():
    with pytest.raises(UsageError, match=r"this lsquant reads format 1"):
        Recipe.from_toml("format = 9\nschedule = 'x'\n")
    assert re.match(r"format = 1\n", Recipe(4).to_toml())
