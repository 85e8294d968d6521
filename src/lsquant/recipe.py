"""Recipes: which layer gets how many bits.  Frozen; presets by name; written to TOML and read back."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lsquant._util.errors import UsageError
from lsquant._util.toml import to_toml
from lsquant.spec import MAX_BITS, MIN_BITS, QuantSpec

INHERIT = "inherit"
"""In a Rule: leave weight or activation to the next rule that matches, at last to the recipe's default."""

Setting = QuantSpec | int | None | str
FORMAT = 1
HALVES = ("weight", "activation")
POSITIONS = ("first", "last")
PRESET = re.compile(r"w(\d+)(?:g(\d+))?(?:a(\d+))?")


def _specification(value: Setting, what: str) -> QuantSpec | str | None:
    """Make a QuantSpec of bits, and weights signed; None and INHERIT stay.  Raises: UsageError naming ``what``."""
    if value is None:
        return None
    if value == INHERIT:
        return INHERIT
    if isinstance(value, int) and not isinstance(value, bool) and MIN_BITS <= value <= MAX_BITS:
        value = QuantSpec(value)
    if not isinstance(value, QuantSpec):
        raise UsageError(f"{what}={value!r}: give bits (2 to 8), a QuantSpec, or None for floating point")
    if what == "activation":
        if value.granularity != "tensor":
            raise UsageError(f"activation={value}: a layer's input has one step; use granularity='tensor'")
        return value
    if value.offset:
        raise UsageError(f"weight={value}: weights are symmetric, an offset belongs to activations")
    return replace(value, signed=True) if value.signed is None else value


@dataclass(frozen=True)
class Rule:
    """Give some layers their bits.

    which: a glob on the layer's name ("stem.*"), "re:..." for a regular expression on the whole name, a layer class
        (subclasses included), "first" or "last" (of the layers that multiply).
    weight, activation: bits, a QuantSpec, None for floating point; left out, the next matching rule decides.
    Raises: UsageError for a value that is not allowed.

    >>> lsquant.Rule("head", weight=8).weight.bits
    8
    """

    which: Any
    weight: Setting = INHERIT
    activation: Setting = INHERIT

    def __post_init__(self) -> None:
        which = self.which
        if isinstance(which, type):
            if not issubclass(which, nn.Module):
                raise UsageError(f"Rule: {which.__name__} is not a layer class")
            object.__setattr__(self, "which", f"class:{which.__module__}.{which.__qualname__}")
        elif not isinstance(which, str):
            raise UsageError(f"Rule: which={which!r}; give a glob, 're:...', a layer class, 'first' or 'last'")
        elif which.startswith("re:"):
            try:
                re.compile(which[3:])
            except re.error as error:
                raise UsageError(f"Rule: {which!r} is not a regular expression: {error}") from error
        for what in HALVES:
            object.__setattr__(self, what, _specification(getattr(self, what), what))

    def matches(self, names: Sequence[str], layer: nn.Module, position: Iterable[str] = ()) -> bool:
        """Tell whether the rule is for a layer.  names: all names of the layer; position: "first" and/or "last"."""
        which: str = self.which
        if which in POSITIONS:
            return which in position
        if which.startswith("class:"):
            return any(f"class:{c.__module__}.{c.__qualname__}" == which for c in type(layer).__mro__)
        if which.startswith("re:"):
            return any(re.fullmatch(which[3:], name) for name in names)
        return any(fnmatchcase(name, which) for name in names)


@dataclass(frozen=True)
class Recipe:
    """Default bits of weights and layer inputs, and rules for some layers.

    For weight and activation each, the first rule that matches a layer and sets it wins.

    weight, activation: bits, a QuantSpec, or None for floating point.
    rules: one that matches no layer is an error in ``prepare``.
    preset_rules: those of a preset; they come after ``rules`` and may match nothing.
    Raises: UsageError for a value that is not allowed.

    >>> recipe = lsquant.Recipe(4, 4, [lsquant.Rule("first", 8, 8)])
    >>> recipe == lsquant.Recipe.from_toml(recipe.to_toml())
    True
    """

    weight: Setting = None
    activation: Setting = None
    rules: Sequence[Rule] = ()
    preset_rules: Sequence[Rule] = field(default=())

    def __post_init__(self) -> None:
        for what in HALVES:
            if getattr(self, what) == INHERIT:
                raise UsageError(f"Recipe: {what}='inherit' has nothing to inherit from")
            object.__setattr__(self, what, _specification(getattr(self, what), what))
        for name in ("rules", "preset_rules"):
            rules = tuple(getattr(self, name))
            for rule in rules:
                if not isinstance(rule, Rule):
                    raise UsageError(f"Recipe: {name} holds {rule!r}, which is not a Rule")
            object.__setattr__(self, name, rules)

    @classmethod
    def preset(
        cls, name: str, *, first_last: int | None = 8, skip: Iterable[Any] = (), rules: Iterable[Rule] = ()
    ) -> Recipe:
        """Make a recipe from a name: ``w4a4``, ``w2a2``, ``w4`` (= ``w4a16``: weights only), ``w4g32`` (groups of 32).

        name: ``w<bits>[g<group size>][a<bits>]``, any case.
        first_last: bits of weight and input of the first and the last layer that multiplies, 8 as in the paper; None:
            like all others.
        skip: names, globs or classes that stay float.
        rules: more rules, which go first.
        Raises: UsageError for an unknown name.

        >>> lsquant.Recipe.preset("w4a4").weight.bits
        4
        """
        match = PRESET.fullmatch(name.lower()) if isinstance(name, str) else None
        if match is None:
            raise UsageError(
                f"Recipe.preset({name!r}): no such preset. Names are w<bits>[g<group size>][a<bits>]: "
                "w2a2, w3a3, w4a4, w8a8, w4a8, w4 (weights only), w4g32"
            )
        bits, group_size, input_bits = (int(digits) if digits else None for digits in match.groups())
        assert bits is not None
        activation = None if input_bits is None or input_bits in (16, 32) else QuantSpec(input_bits)
        weight = QuantSpec(bits, signed=True)
        if group_size:
            weight = replace(weight, granularity="group", group_size=group_size)
        first_and_last: tuple[Rule, ...] = ()
        if first_last is not None:
            input_setting = None if activation is None else first_last
            first_and_last = tuple(Rule(position, first_last, input_setting) for position in POSITIONS)
        skipped = [skip] if isinstance(skip, (str, type)) else skip
        skip_rules = tuple(Rule(which, None, None) for which in skipped)
        return cls(weight, activation, (*rules, *skip_rules), first_and_last)

    def all_rules(self) -> tuple[Rule, ...]:
        """Return the user's rules, then the preset's."""
        return (*self.rules, *self.preset_rules)

    def resolve(
        self, names: Sequence[str], layer: nn.Module, position: Iterable[str] = ()
    ) -> tuple[QuantSpec | None, QuantSpec | None, int]:
        """Return (weight, activation, strength) of one layer; None is floating point.

        names: all names of the layer.
        layer: the module.
        position: "first" and/or "last".
        strength: what decided the weight: 2 a rule of the user's, 1 a rule of the preset, 0 the default.
        """

        def pick(get: Callable[[Rule | Recipe], Any]) -> tuple[QuantSpec | None, int]:
            for strength, rules in ((2, self.rules), (1, self.preset_rules)):
                for rule in rules:
                    if get(rule) != INHERIT and rule.matches(names, layer, position):
                        return get(rule), strength
            return get(self), 0

        weight, strength = pick(lambda r: r.weight)
        return weight, pick(lambda r: r.activation)[0], strength

    # ---- TOML ----

    def to_toml(self) -> str:
        """Return the recipe as TOML; ``Recipe.from_toml`` gives an equal one."""

        def entry(value: Any) -> Any:
            return value.to_dict() if isinstance(value, QuantSpec) else "float" if value is None else value

        def table(rule: Rule) -> dict[str, Any]:
            halves = {half: entry(getattr(rule, half)) for half in HALVES if getattr(rule, half) != INHERIT}
            return {"which": rule.which, **halves}

        values: dict[str, Any] = {
            "format": FORMAT,
            "weight": entry(self.weight),
            "activation": entry(self.activation),
            "rules": [table(r) for r in self.rules],
            "preset_rules": [table(r) for r in self.preset_rules],
        }
        return to_toml({k: v for k, v in values.items() if v != []})

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """Read a recipe.  Raises: UsageError for broken TOML, unknown keys or a newer format."""
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"recipe: not valid TOML: {error}") from error
        if (version := values.pop("format", FORMAT)) != FORMAT:
            raise UsageError(f"recipe: format {version!r}; this lsquant reads format {FORMAT}, update it")
        known = {"weight", "activation", "rules", "preset_rules"}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"recipe: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")

        def entry(value: Any) -> Any:
            return QuantSpec.from_dict(value) if isinstance(value, dict) else None if value == "float" else value

        def rule(table: Any) -> Rule:
            if not isinstance(table, dict) or "which" not in table or set(table) - {"which", "weight", "activation"}:
                raise UsageError(f"recipe: a rule has 'which' and 'weight' and/or 'activation', not {table!r}")
            return Rule(table["which"], **{k: entry(v) for k, v in table.items() if k != "which"})

        def rules(name: str) -> list[Rule]:
            if not isinstance(tables := values.get(name, []), list):
                raise UsageError(f"recipe: {name} is a list of rules, written [[{name}]], not {tables!r}")
            return [rule(t) for t in tables]

        halves = (entry(values.get("weight")), entry(values.get("activation")))
        return cls(*halves, rules("rules"), rules("preset_rules"))
