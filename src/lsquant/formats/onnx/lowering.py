"""Marked nodes -> standard ONNX operators, one small group of nodes per quantized layer.

All forms quantize by ``QuantizeLinear``, which divides and rounds half to even as section 1 of the mathematics asks.
``codes.py`` holds codes in range, ``exact.py`` writes sums of integers, ``qdq.py`` float operators over
DequantizeLinear, ``tables.py`` the rows of embeddings.  Which of the first two another layer gets is decided here:

- profile exact: sums of integers; a layer of which one side stays float, as in qdq.
- profile small: as exact, with weights of at most 4 bits in initializers of 4 or 2 bits and a Cast after them.  A
  weight whose input is not quantized, and a group-wise convolution, are written by DequantizeLinear as in qdq, groups
  in blocks.
- profile qdq: float operators.
"""

from __future__ import annotations

from typing import Any

from lsquant._util.errors import UsageError
from lsquant.formats.onnx.codes import dequantize, narrow_type, quantize_to_bytes
from lsquant.formats.onnx.exact import write_exact
from lsquant.formats.onnx.graph import Dims, Graph, LayerTrace
from lsquant.formats.onnx.qdq import write_qdq
from lsquant.formats.onnx.tables import write_rows
from lsquant.shipped import FrozenQuantizer, IntegerConv, IntegerEmbedding


def lower(graph: Graph, layer: Any, trace: LayerTrace, shapes: tuple[Dims, Dims], profile: str, opset: int) -> None:
    """Write the nodes of one call of a frozen layer from ``trace.input`` to ``trace.output``, and fill in ``trace``.

    layer: an IntegerLayer, or a FrozenQuantizer that stands alone.
    shapes: of the input and of the output, None for a free dimension.
    opset: of the file, which has INT4 or not.

    Raises: UsageError where the profile has no form for the layer.
    """
    name = trace.label
    graph.prefix = name if trace.call == 0 else f"{name}#{trace.call + 1}"
    if isinstance(layer, FrozenQuantizer):
        codes = quantize_to_bytes(graph, layer, trace)
        dequantize(graph, codes, layer, trace, trace.output, len(shapes[1]), standard=profile == "qdq")
        return
    if isinstance(layer, IntegerEmbedding):
        write_rows(graph, layer, trace, len(shapes[0]), profile)
        return
    narrow_opset = opset if profile == "small" else 0
    grouped = isinstance(layer, IntegerConv) and layer.group_size is not None
    if profile == "qdq" or layer.scale is None or (grouped and narrow_opset):
        low, high = layer.weight_bounds
        write_qdq(graph, layer, trace, shapes, narrow_type(low, high, narrow_opset))
    elif grouped:
        raise UsageError(
            f"{name}: a convolution with group-wise weight steps has no exact form in ONNX; "
            "use granularity='channel' for it, or profile='small' or 'qdq'"
        )
    else:
        write_exact(graph, layer, trace, shapes, narrow_opset)
