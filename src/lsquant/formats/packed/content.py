"""What a packed file holds, as plain tensors (docs/format.md states the format).

Tensors: ``QUANTIZER.codes`` uint8, densely packed; ``QUANTIZER.step`` float32; ``QUANTIZER.zero_point`` int32 with an
offset; everything that stays float under its own name.  The metadata ``lsquant.packed`` is one JSON object.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lsquant.recipe import Recipe, Rule, glob_of, target_of
from lsquant.shipped.record import own_layout
from lsquant.spec import QuantSpec

FORMAT, JOINED_FORMAT = 1, 2
"""Version of the format without stored tensors, and with them; a reader refuses a higher one."""
KEY = "lsquant.packed"
"""The key of the metadata."""


@dataclass(frozen=True)
class PackedQuantizer:
    """One quantizer of a packed file.

    spec: bits, sign and granularity, decided.
    asked: the same as the recipe has it.
    step: (steps,) float32, guarded.
    zero_point: (steps,) int32, or None for 0.
    count: N of the gradient scale, 0 where unknown.
    axis: the dimension with a step per index, or None.
    weight: name of the weight, None for activations, which have nothing of the following.
    rows: (steps, codes that share one) int8 or uint8.
    shape: of the weight with output channels first.
    swapped: the groups of a convolution within which the weight itself has the first two dimensions of ``shape``
        exchanged, or 0.
    tied: name of the quantizer whose step it has, None where the step is its own.
    """

    spec: QuantSpec
    asked: QuantSpec
    step: Tensor
    zero_point: Tensor | None
    count: int
    axis: int | None
    weight: str | None = None
    rows: Tensor | None = None
    shape: tuple[int, ...] = ()
    swapped: int = 0
    tied: str | None = None

    @property
    def codes(self) -> Tensor | None:
        """int8 or uint8 in the weight's own shape; None for activations."""
        return None if self.rows is None else self._own(self.rows)

    @property
    def values(self) -> Tensor | None:
        """``code * step``, float32 in the weight's own shape; None for activations."""
        return None if self.rows is None else self._own(self.rows.to(torch.float32) * self.step.unsqueeze(1))

    def _own(self, rows: Tensor) -> Tensor:
        return own_layout(rows.reshape(self.shape), self.swapped)

    def state(self) -> dict[str, Tensor]:
        """Return a Quantizer's state dict.  The offset ``-z * s`` rounds to z again; the step is above its guard."""
        if self.tied is not None:
            return {"signed": torch.tensor(int(bool(self.spec.signed)), dtype=torch.int8)}
        state = {
            "step": self.step,
            "initial_step": self.step,
            "signed": torch.tensor(int(bool(self.spec.signed)), dtype=torch.int8),
            "count": torch.tensor(self.count),
            "initialized": torch.tensor(True),
        }
        return state if self.zero_point is None else {**state, "offset": -self.zero_point * self.step}


@dataclass(frozen=True)
class Packed:
    """The content of a packed file.

    quantizers: name -> PackedQuantizer.
    floats: name in the state dict -> tensor that is not quantized.
    layers: name -> {"type", and "weight", "input" and "stored" where quantized: names of quantizers}.
    aliases: second name -> stored name.
    versions: of lsquant and torch that wrote it.
    joins: of what joins read, None where they are floating point.
    """

    quantizers: dict[str, PackedQuantizer]
    floats: dict[str, Tensor]
    layers: dict[str, dict[str, str]]
    aliases: dict[str, str]
    versions: dict[str, str]
    joins: QuantSpec | None = None

    def recipe(self) -> Recipe:
        """Return a recipe with one rule per layer, by exact name."""
        asked = {None: None, **{name: q.asked for name, q in self.quantizers.items()}}
        rules = [
            Rule(glob_of(name), asked[layer.get("weight")], asked[layer.get("input")])
            for name, layer in self.layers.items()
        ]
        return Recipe(None, None, rules, joins=self.joins, target=target_of(self.joins))


def crc32(t: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
