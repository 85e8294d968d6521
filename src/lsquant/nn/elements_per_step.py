"""N, the number of elements that share a step (``g = 1 / sqrt(N * q_max)``), for weights and inputs of every layer.

A weight's N is the number of weights that share a step.  An input's N is the number of features of ONE sample, never
the batch: of a linear layer the last dimension (so not the sequence either), of a convolution input channels times
spatial size of the first batch that calibration sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsquant._util.errors import UsageError


def weight_steps(shape: torch.Size, granularity: str, group_size: int | None, name: str) -> tuple[int, int]:
    """Count the steps of a weight, and the weights that share one.

    shape: of the weight, output channels first.
    granularity: "tensor", "channel" or "group".
    group_size: weights per group, for "group".
    name: of the layer, for the message.
    Returns: (steps, N).
    Raises: UsageError naming the layer when the group size does not divide the weights per output channel.
    """
    total, row = shape.numel(), shape.numel() // shape[0]
    if granularity == "tensor":
        return 1, total
    if granularity == "channel":
        return shape[0], row
    if not group_size or row % group_size:
        raise UsageError(
            f"layer {name!r}: group_size={group_size} does not divide its {row} weights per output channel "
            f"(weight {tuple(shape)}); choose a divisor, or give this layer another rule"
        )
    return total // group_size, group_size


def input_elements(layer: Any, x: Tensor | None = None) -> int:
    """Count the features of one sample of a layer's input: N of its step.

    layer: a float or quantized layer.
    x: an input of it, with or without batch dimension; None: from the layer alone.
    Returns: N, or 0 where it is known only from an input.
    """
    if x is None:
        return getattr(layer, "in_features", 0)
    dimensions = layer.weight.dim()
    if dimensions == 2:  # a linear layer; a convolution's weight has as many dimensions as a batch of its input
        return x.shape[-1]
    sample = x.shape[1:] if x.dim() == dimensions else x.shape
    return sample.numel()
