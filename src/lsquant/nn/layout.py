"""Where a kind of layer keeps its output channels, and how rows, output channels first, are made of its weight."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lsquant import ops


class WeightLayout(Enum):
    """The order of the first two dimensions of a weight, declared once by every kind of quantized layer."""

    OUTPUT_FIRST = "(out, in / groups, ...)"
    INPUT_FIRST = "(in, out / groups, ...)"

    def rows(self, weight: Tensor, groups: int = 1) -> Tensor:
        """Return (out, in / groups, ...) from a weight of this layout, differentiable.

        groups: of a convolution; 1 for other layers.
        """
        if self is WeightLayout.OUTPUT_FIRST:
            return weight
        return weight.t() if weight.dim() == 2 else ops.swap_channels(weight, groups)

    def weight(self, rows: Tensor, groups: int = 1) -> Tensor:
        """Return a weight of this layout from rows: the inverse of ``rows``, the same exchange of two dimensions."""
        return self.rows(rows, groups)

    def row_shape(self, shape: torch.Size, groups: int = 1) -> torch.Size:
        """Return the shape of ``rows`` of a weight of this shape."""
        if self is WeightLayout.OUTPUT_FIRST:
            return shape
        inputs, outputs, *others = shape
        return torch.Size([outputs * groups, inputs // groups, *others])


def conv_groups(layer: Any) -> int:
    """Return the groups of a convolution; 1 for other layers."""
    return getattr(layer, "groups", 1)
