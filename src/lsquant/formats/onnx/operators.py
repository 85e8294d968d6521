"""What the forms of a layer share: its bias, values per channel, the geometry of a convolution."""

from __future__ import annotations

from typing import Any

import numpy as np

from lsquant.formats.onnx.graph import Dims, Graph, LayerTrace, array
from lsquant.shipped import IntegerConv, IntegerLayer


def add_bias(graph: Graph, layer: IntegerLayer, trace: LayerTrace, y: str) -> None:
    """Write the last node, the bias, or let the node before it end at the layer's output where there is no bias.

    The bias is added in float32, whatever its type, as it was in training.
    """
    if layer.bias is None:
        graph.nodes[-1].output[0] = trace.output
        return
    shaped = per_channel(array(layer.bias.float()), layer, scalar=False)
    graph.node("Add", [y, graph.constant(f"{trace.label}.bias", shaped)], trace.output, "Add_bias")


def per_channel(values: np.ndarray, layer: IntegerLayer, scalar: bool = True) -> np.ndarray:
    """Return one value for each output channel in the shape in which it is broadcast."""
    if scalar and values.size == 1:
        return values.reshape(())
    return values.reshape(-1, *[1] * len(layer.kernel_size)) if isinstance(layer, IntegerConv) else values


def geometry(layer: IntegerConv) -> dict[str, Any]:
    """Return the attributes of a convolution, in any of ONNX' operators."""
    before, after = zip(*layer.node_padding, strict=True)
    return {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "pads": [*before, *after],
        "dilations": layer.dilation,
        "group": layer.groups,
    }


def output_padding(layer: IntegerConv, shapes: tuple[Dims, Dims]) -> list[int]:
    """Return by how much the output of a transposed convolution is longer than its least size.

    shapes: of input and output.  Where a size is unknown the layer's own output padding is taken.
    """
    extra = list(layer.output_padding)
    sides = zip(*(s[2:] for s in shapes), layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True)
    for i, (n, out, s, (a, b), d, k) in enumerate(sides):
        if n is not None and out is not None:
            extra[i] = out - ((n - 1) * s - a - b + d * (k - 1) + 1)
    return extra
