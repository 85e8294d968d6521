"""What a file or a model holds, beside what ships: the pairs that the level ``weights`` of a verdict compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lsquant.shipped.record import Shipped

Array = Tensor | np.ndarray


class Pair(NamedTuple):
    """Two tensors or arrays that must be equal.

    name: of the layer or quantizer, for the verdict.
    found: what the file holds, None where it lacks it.
    shipped: what the trained model ships, None where the file holds too much.
    """

    name: str
    found: Array | None
    shipped: Array | None


@dataclass(frozen=True)
class Stored:
    """What a file holds of one quantizer.

    step: (steps,) float32.
    zero_point: (steps,) int32, None for 0.
    codes: (out, ...) int8 or uint8, output channels first, None for a quantizer of activations.
    """

    step: Tensor
    zero_point: Tensor | None = None
    codes: Tensor | None = None


def paired(record: Shipped, stored: Mapping[str, Stored]) -> Iterator[Pair]:
    """Yield the pairs of a file that stores quantizers under their own names.

    A shared weight is compared once for each of its layers.
    """
    for name, quantizer in record.quantizers.items():
        found = stored.get(name)
        yield Pair(name, None if found is None else found.step, quantizer.step)
        zero_point = None if found is None else found.zero_point
        if zero_point is not None or quantizer.zero_point is not None:
            yield Pair(name, zero_point, quantizer.zero_point)
    for layer in record.layers.values():
        if layer.weight is not None and layer.weight.weight is not None:
            found = stored.get(layer.weight.name)
            yield Pair(layer.weight.name, None if found is None else found.codes, layer.weight.weight.codes)
    for name in sorted(set(stored) - set(record.quantizers)):
        yield Pair(name, stored[name].step, None)
