"""Progressive bits: train at more bits first, then at fewer."""

from __future__ import annotations

from dataclasses import replace

from lsquant.recipe import Recipe, Rule
from lsquant.spec import QuantSpec


def widened(recipe: Recipe, bits: int) -> Recipe:
    """Return the recipe with at least `bits` bits for every quantizer; what has more, or stays float, is unchanged."""

    def wide(value: object) -> object:
        return replace(value, bits=max(bits, value.bits)) if isinstance(value, QuantSpec) else value

    def all_wide(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(replace(r, weight=wide(r.weight), activation=wide(r.activation)) for r in rules)  # type: ignore[arg-type]

    halves = {name: wide(getattr(recipe, name)) for name in ("weight", "activation", "joins")}
    return Recipe(**halves, rules=all_wide(tuple(recipe.rules)), preset_rules=all_wide(tuple(recipe.preset_rules)))  # type: ignore[arg-type]
