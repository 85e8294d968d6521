"""Progressive bits: train at more bits first, then at fewer."""

from __future__ import annotations

from dataclasses import replace

from lsquant.recipe import Recipe, Rule
from lsquant.spec import SYMMETRIC_BITS, QuantSpec


def widened(recipe: Recipe, bits: int) -> Recipe:
    """Return the recipe with at least `bits` bits for every quantizer; what has more, or stays float, is unchanged."""

    def wide(value: object) -> object:
        if not isinstance(value, QuantSpec):
            return value
        most = SYMMETRIC_BITS if value.container == "symmetric" and value.signed is False else bits
        return replace(value, bits=max(min(bits, most), value.bits))

    def all_wide(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(replace(r, weight=wide(r.weight), activation=wide(r.activation)) for r in rules)  # type: ignore[arg-type]

    halves = {name: wide(getattr(recipe, name)) for name in ("weight", "activation", "joins")}
    rules = {"rules": all_wide(tuple(recipe.rules)), "preset_rules": all_wide(tuple(recipe.preset_rules))}
    return Recipe(**halves, **rules, target=recipe.target)  # type: ignore[arg-type]
