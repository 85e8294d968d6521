"""Recipes: presets by name, rules and their order, TOML round trip, refusals."""

from __future__ import annotations

import dataclasses
import re
import sys
import tomllib
import types
from typing import Any

import pytest
from torch import nn

import lsquant
from helpers.convert import net
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import MissingExtra, UsageError
from lsquant._util.toml import to_toml
from lsquant.recipe import glob_of, literal_of, name_of

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


def test_portable_x86():
    """Weights of 8 bits have 7; inputs and other weights are as they were."""
    bits = {}
    for name, first_last in (("w8a8", 8), ("w4a8", 8), ("w8a8", None)):
        recipe = Recipe.preset(name, integer_only=True, portable_x86=True, first_last=first_last)
        assert recipe.joins == QuantSpec(8)
        rules = [(rule.which, rule.weight.bits, rule.activation.bits) for rule in recipe.preset_rules]
        bits[name, first_last] = (recipe.weight.bits, recipe.activation.bits, rules)
    ends = [("first", 7, 8), ("last", 7, 8)]
    assert bits == {("w8a8", 8): (7, 8, ends), ("w4a8", 8): (4, 8, ends), ("w8a8", None): (7, 8, [])}
    with pytest.raises(UsageError, match="portable_x86=True is for integer-only networks"):
        Recipe.preset("w8a8", portable_x86=True)
    with pytest.raises(UsageError, match="portable_x86=1; it must be True or False"):
        Recipe.preset("w8a8", integer_only=True, portable_x86=1)


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


# ---- recipes in files: names, bounded globs, and google-re2 for other patterns ----

NAMES = ["", "a", "blocks.0.fc1", "a[0]", "*", "?", "[", "]", "[!a]", "first", "last", "re:x", "re2:x", "class:x",
         "a b", "a\\b", "ä.ß", "a-b", "^a$", "re"]  # fmt: skip


def of_file(which: str) -> Rule:
    return Recipe.from_toml(to_toml({"rules": [{"which": which, "weight": 8}]})).rules[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_for_one_name_matches_it_and_nothing_else(name):
    for rule in (Rule(glob_of(name), 8), of_file(glob_of(name))):
        assert rule.name == name
        assert [other for other in NAMES if rule.matches([other], LINEAR, ["first", "last"])] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_escaped_names_of_older_files_are_read_as_names(name):
    """What lsquant.save wrote before: ``re:`` and re.escape(name)."""
    for pattern in (re.escape(name), f"^{re.escape(name)}$", rf"\A{re.escape(name)}\Z"):
        assert literal_of(pattern) == name
        rule = of_file(f"re:{pattern}")
        assert rule.name == name
        assert rule.matches([name], LINEAR)


@pytest.mark.parametrize(
    "pattern", ["a.b", "a*", "a|b", "(a)", "[a]", r"\d", "a\\", "a{2}", "a+", "a$b", "a?", r"\Aa\B"]
)
def test_what_is_more_than_one_name(pattern):
    assert literal_of(pattern) is None


def test_globs_are_no_names():
    assert [name_of(which) for which in ("a*", "a?", "[ab]", "[!a]", "first", "re:a", "class:a.B")] == [None] * 7


def test_regular_expressions_in_files_need_google_re2(monkeypatch):
    monkeypatch.setitem(sys.modules, "re2", None)
    with pytest.raises(MissingExtra, match=r"'re:\(a\+\)\+\$'.*pip install 'lsquant\[re2\]'"):
        of_file("re:(a+)+$")
    assert Rule("re:(a+)+", 4).matches(["aa"], LINEAR)  # of code, as before


def test_regular_expressions_in_files_are_google_re2s(monkeypatch):
    """A stand-in for the package: patterns of files reach it, with bounded memory, and Python's ``re`` never."""
    asked: list[Any] = []

    class Options:
        log_errors, max_mem = True, 8 << 20

    class Pattern:
        def fullmatch(self, text: str) -> Any:
            return text == "hit" or None

    def compiled(pattern: str, options: Any) -> Pattern:
        asked.append((pattern, options.log_errors, options.max_mem))
        if pattern == "(":
            raise ValueError("missing )")
        return Pattern()

    stand_in = types.SimpleNamespace(Options=Options, compile=compiled, error=ValueError)
    monkeypatch.setitem(sys.modules, "re2", stand_in)
    recipe = Recipe(rules=[of_file("re:(a+)+$")])
    assert (bits(recipe, "hit"), bits(recipe, "aaa")) == ((8, None), (None, None))
    assert set(asked) == {("(a+)+$", False, 1 << 20)}
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    with pytest.raises(UsageError, match=r"rules\[0\]: Rule: '\(' is not a regular expression"):
        of_file("re:(")


def test_files_hold_names():
    """Classes and regular expressions by what they match, in order; positions and globs stay."""
    model = net()
    rules = [Rule("re:[05]", 8), Rule("5", 3), Rule("*", activation=None), Rule(nn.Linear, 2), Rule("first", 8)]
    recipe = Recipe(4, 4, rules, [Rule(nn.Conv2d, 6), Rule("last", 8)])
    named = recipe.with_names(model)
    assert [rule.which for rule in named.rules] == ["0", "5", "5", "*", "5", "first"]
    assert [rule.which for rule in named.preset_rules] == ["0", "last"]
    assert (recipe.has_only_names, named.has_only_names) == (False, True)
    for name, position in (("0", ("first",)), ("5", ("last",))):
        layer = model.get_submodule(name)
        assert named.resolve([name], layer, position) == recipe.resolve([name], layer, position)
    assert Recipe.from_toml(named.to_toml()) == named


def test_a_saved_file_holds_names():
    model = net()
    lsquant.prepare(model, Recipe(4, 4, [Rule("re:.*5", 8), Rule(nn.Conv2d, 3)]))
    assert [rule.which for rule in lsquant.resolved_recipe(model).rules] == ["0", "5"]


def test_many_rules_for_names_take_no_time():
    """20,000 names against 20,000 layers: each is looked up, not tried one after the other."""
    recipe = Recipe(None, None, [Rule(f"layer.{i}", 2 + i % 7) for i in range(20_000)])
    assert all(bits(recipe, f"layer.{i}")[0] == 2 + i % 7 for i in range(20_000))


@pytest.mark.parametrize(
    "text, says",
    [
        ("weight = {bits = 4, narrow = 'no'}", r"weight: QuantSpec: narrow='no'; use True or False"),
        ("activation = {bits = 4, offset = 'no'}", r"activation: QuantSpec: offset='no'; use True or False"),
        ("activation = {bits = 4, signed = 1}", r"activation: QuantSpec: signed=1; use True, False or None"),
        ("weight = {bits = true}", r"bits=True"),
        ("weight = {bits = 4.0}", r"bits=4\.0"),
        ("weight = {bits = 4, granularity = ['channel']}", r"granularity=\['channel'\]"),
        ("weight = {bits = 4, granularity = 'group', group_size = 8.0}", r"group_size=8\.0"),
        ("weight = {bits = 4, granularity = 'group', group_size = true}", r"group_size=True"),
        ("weight = {bits = 4, dynamic = 0}", "unknown field 'dynamic'"),
        ("weight = 0x" + "f" * 300, "weight=an integer of 1200 bits"),
        ("weight = true", "weight=True"),
        ("format = true", "format True"),
        ("weight = " + "[" * 5000 + "]" * 5000, "not valid TOML"),
        (".".join("a" * 500) + " = 1", "nested deeper than 64 levels"),
        ("weight = " + "9" * 5000, "not valid TOML"),
        ("[[rules]]\nwhich = 'x'\nweight = 4\nbits = 4", r"rules\[0\]: unknown key 'bits'"),
        ("[[rules]]\nwhich = '" + "x" * 1001 + "'", r"rules\[0\]\.which is 'xxx.*at most 1000 characters"),
        ("[[rules]]\nwhich = '" + "*a" * 33 + "'", "33 stars in one glob"),
        ("[[rules]]\nwhich = 'class:os.path; x'", "is no name of a class"),
        ('[[rules]]\nwhich = "x\\u0000"', r"rules\[0\]\.which"),
        ("".join(f"[[rules]]\nwhich = 'x{i}*'\n" for i in range(1001)), "1,001 rules with patterns"),
        ("#" * (1 << 23) + "#", "8,388,609 bytes of TOML"),
    ],
    ids=lambda value: value[:40],
)
def test_types_and_bounds_of_files(text, says):
    with pytest.raises(UsageError, match=rf"^recipe: .*{says}"):
        Recipe.from_toml(text)
