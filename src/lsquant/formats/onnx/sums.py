"""How large the integer sums of a layer can become, found from its trained codes, and how they are split.

An integer operator of ONNX adds up in int32.  Codes are stored shifted, and a runtime may multiply the zero points out:

    sum (x - z)(w - v) = sum x w - v sum x - z sum w + sum z v

So the bound is that of all four terms together, ``sum (|x| + |z|)(|w| + |v|)``: below 2^31 no order of additions, and
no accumulator that saturates, changes a sum.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from lsquant._util.errors import UsageError
from lsquant.formats.onnx.graph import array
from lsquant.shipped import IntegerLayer

FLOAT_SUMS = 2**24
"""Sums of integers that stay below this are exact in float32, in any order."""

INT32_SUMS = 2**31
"""Sums of integers that stay below this are exact in int32."""


class Operands(NamedTuple):
    """What an integer operator multiplies.

    q: the codes of the input, as they are stored.
    reach: the largest ``|x| + |z|`` of a stored code and its zero point.
    stored: (out, terms, ...) the codes of the weight, as they are stored.
    weight_point: v, their zero point.
    narrow: the type of ml_dtypes with 4 or 2 bits that the codes of the weight have in the file, or None.
    """

    q: str
    reach: int
    stored: np.ndarray
    weight_point: int
    narrow: Any


def largest_sum(layer: IntegerLayer) -> int:
    """Return ``max over outputs of sum |q_w|  *  max |q_x - z|``: no sum of products, nor part of one, is larger."""
    source, codes = layer.input, layer.codes
    assert source is not None
    assert codes is not None
    zero = 0 if source.zero_point is None else int(source.zero_point.item())
    return max(abs(source.q_min - zero), abs(source.q_max - zero)) * _largest_row(array(codes), 0)


def fits_int32(layer: IntegerLayer) -> bool:
    """Tell whether the sums of a layer fit int32 in whatever byte, signed or not, a runtime stores its codes."""
    source, codes = layer.input, layer.codes
    assert source is not None
    assert codes is not None
    zero = 0 if source.zero_point is None else int(source.zero_point.abs().max())
    shift = 128 if source.q_min < 0 else 0
    reach = max(abs(source.q_min), abs(source.q_max)) + zero + 2 * shift
    return reach * _largest_row(array(codes), 2 * 128) < INT32_SUMS


def split_terms(operands: Operands, label: str) -> list[int]:
    """Return the edges of the parts into which the second dimension of the weight is split: (0, terms) for one part.

    label: of the layer, for messages.

    Raises: UsageError where a single input channel is too much.
    """
    stored, terms = operands.stored, operands.stored.shape[1]
    bound = operands.reach * _largest_row(stored, operands.weight_point)
    count = bound // INT32_SUMS + 1
    while count <= terms:
        edges = [terms * i // count for i in range(count + 1)]
        parts = (stored[:, a:b] for a, b in itertools.pairwise(edges))
        if all(operands.reach * _largest_row(part, operands.weight_point) < INT32_SUMS for part in parts):
            return edges
        count += 1
    raise UsageError(
        f"export_onnx: the sums of layer {label!r} can reach {bound:,}, beyond int32, and those of one input channel "
        "alone cannot be split; give it fewer bits, or leave it in floating point (skip=)"
    )


def _largest_row(stored: np.ndarray, point: int) -> int:
    """Return ``max over outputs of sum (|w| + |v|)``, exactly."""
    if not stored.size:
        return 0
    rows = stored.reshape(len(stored), -1)
    sums = np.abs(rows.astype(np.int16)).sum(1, dtype=np.int64)
    return int(sums.max()) + point * rows.shape[1]
