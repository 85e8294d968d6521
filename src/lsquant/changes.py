"""``Changes``: what ``prepare`` did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lsquant._util.errors import UsageError


@dataclass(frozen=True)
class Change:
    """One layer, or another module with weights that stays in floating point.

    name: in the model; "" for the root.
    kind: its float type.
    weight, activation: what they became, in words; "float" where not quantized.
    weights: their number; 0 for a module that has none and multiplies in its own forward pass.
    reason: why it stays float, and with which layer it shares its weight.
    shares: the first layer that has the same weight; None where it is this one.  A shared weight counts once.
    multiplications: of its matrix products and convolutions in the example batch, those of attention and recurrent
        layers included; None without a batch, 0 for lookups.
    unwritten: the calls that have no form for it, ``("to_torchao",)`` for a quantized Conv1d.
    """

    name: str
    kind: str
    weight: str
    activation: str
    weights: int
    reason: str = ""
    shares: str | None = None
    multiplications: int | None = None
    unwritten: tuple[str, ...] = ()


class Changes(tuple[Change, ...]):
    """What ``prepare`` did: a tuple of ``Change``, a row per layer; prints as a table.

    It is no model: prepare works in place.
    """

    @property
    def quantized(self) -> tuple[Change, ...]:
        """Return the layers with at least one quantizer."""
        return tuple(c for c in self if (c.weight, c.activation) != ("float", "float"))

    @property
    def weight_share(self) -> float:
        """Return quantized weights / all weights of these layers, 0 to 1; a shared weight counts once."""
        counted = [c for c in self if c.shares is None]
        total = sum(c.weights for c in counted)
        return sum(c.weights for c in counted if c.weight != "float") / total if total else 0.0

    @property
    def multiplication_share(self) -> float | None:
        """Return multiplications with input and weight quantized / all of the model, 0 to 1.

        All are those of every matrix product and convolution in the example batch, also in functions and in layers that
        stay float; elementwise products are not counted.  None where ``prepare`` had no example inputs.
        """
        total = sum(c.multiplications or 0 for c in self)
        done = sum(c.multiplications or 0 for c in self if "float" not in (c.weight, c.activation))
        return done / total if total else None

    def __str__(self) -> str:
        rows = [("layer", "type", "weight", "input", "weights", "note")]
        rows += [(c.name or "(root)", c.kind, c.weight, c.activation, f"{c.weights:,}", c.reason) for c in self]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        summary = f"{len(self.quantized)} layers quantized, {self.weight_share:.1%} of the weights"
        share = self.multiplication_share
        if share is not None:
            summary += f", {share:.1%} of the multiplications (weight and input quantized)"
        return "\n".join([*lines, *self._unwritten(), summary])

    def _unwritten(self) -> list[str]:
        """Return a line for each call that cannot write some layer."""
        layers: dict[str, list[str]] = {}
        for change in self:
            for call in change.unwritten:
                layers.setdefault(call, []).append(change.name or "(root)")
        lines = []
        for call, names in layers.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{call} has no form for {', '.join(names[:3])}{more}; leave them float for it (skip=)")
        return lines

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError("prepare works in place: go on using the model you passed, not what prepare returned")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(nn.Module, name):
            raise AttributeError(name)
        raise UsageError(f"prepare works in place: call .{name} on the model you passed, not on what prepare returned")
