"""A layer as a float operator over DequantizeLinear: the form that most runtimes know, not exact in all of them.

Codes are in int8 containers, in uint8 for unsigned codes of 8 bits.  Those of fewer bits are held in range before
QuantizeLinear (``codes.py``), so that it and DequantizeLinear stay neighbours.

    x -> Clip -> QuantizeLinear -> DequantizeLinear -> Conv | Gemm | MatMul(DequantizeLinear(codes)) + bias

DequantizeLinear is a licence for a runtime to compute otherwise.  Where that would be wrong, ``(code - z) * s`` is
written by Cast, Sub and Mul:

- an input beside a float weight: ONNX Runtime would quantize that weight by itself;
- a weight beside a float input in MatMul: ONNX Runtime would fuse them to MatMulNBits, which rounds the input to 8
  bits;
- both, where sums over codes could leave int32 in a fused integer operator.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lsquant.formats.onnx.codes import dequantize, quantize_to_bytes, weight_steps
from lsquant.formats.onnx.graph import FLOAT, Dims, Graph, LayerTrace, array
from lsquant.formats.onnx.operators import add_bias, geometry, output_padding
from lsquant.formats.onnx.sums import fits_int32
from lsquant.formats.onnx.tables import shared_table, turned_table
from lsquant.shipped import IntegerConv, IntegerLayer


def write_qdq(graph: Graph, layer: IntegerLayer, trace: LayerTrace, shapes: tuple[Dims, Dims], narrow: Any) -> None:
    """Write the nodes of a layer quantized in one side or both.

    shapes: of input and output.
    narrow: the type of ml_dtypes with 4 or 2 bits for the codes of the weight, or None for a byte.
    """
    x, rank = trace.input, len(shapes[1])
    turned = rank != 2 and not isinstance(layer, IntegerConv)
    standard = layer.codes is not None and (fits_int32(layer) if layer.input is not None else not turned)
    if layer.input is not None:
        codes = quantize_to_bytes(graph, layer.input, trace)
        x = dequantize(graph, codes, layer.input, trace, f"{graph.prefix}/dequantized", rank, standard)
    product = f"{graph.prefix}/product"
    weight = _weight(graph, layer, trace, narrow, turned, standard)
    if isinstance(layer, IntegerConv):
        if layer.transposed:
            _transposed(graph, layer, trace, [x, weight], output_padding(layer, shapes))
        else:
            graph.node("Conv", [x, weight], product, **geometry(layer))
    elif rank == 2:
        graph.node("Gemm", [x, weight], product, transB=1)
    else:
        graph.node("MatMul", [x, weight], product)
    add_bias(graph, layer, trace, product)


def _transposed(graph: Graph, layer: IntegerConv, trace: LayerTrace, operands: list[str], extra: list[int]) -> None:
    """Write ConvTranspose to ``product``; ONNX Runtime refuses an output padding of a stride or more.

    Such a one takes away from the padding at the end instead; what is left of it are zeros that no input reaches.
    """
    attributes, product = geometry(layer), f"{graph.prefix}/product"
    large = [e if e >= s else 0 for e, s in zip(extra, layer.stride, strict=True)]
    if not any(large):
        graph.node("ConvTranspose", operands, product, **attributes, output_padding=extra)
        return
    count, pads = len(extra), attributes["pads"]
    ends = [p - e for p, e in zip(pads[count:], large, strict=True)]
    attributes["pads"] = [*pads[:count], *(max(end, 0) for end in ends)]
    rest = [e - big for e, big in zip(extra, large, strict=True)]
    zeros = [max(-end, 0) for end in ends]
    if not any(zeros):
        graph.node("ConvTranspose", operands, product, **attributes, output_padding=rest)
        return
    y = graph.node("ConvTranspose", operands, f"{graph.prefix}/reached", **attributes, output_padding=rest)
    after = graph.constant(f"{trace.label}.output_pads", np.array([0] * (4 + count) + zeros))
    graph.node("Pad", [y, after], product, "Pad_output")


def _weight(graph: Graph, layer: IntegerLayer, trace: LayerTrace, narrow: Any, turned: bool, standard: bool) -> str:
    """Write the float weight in the operator's own layout: an initializer, or the codes and what dequantizes them.

    turned: whether the operator wants (in, out).
    standard: whether to use DequantizeLinear; blocks always do.

    Groups are blocks of DequantizeLinear where ``narrow`` is a type, else rows of the stored codes.  Blocks lie along
    the second axis: ONNX Runtime fuses those along the first to MatMulNBits, which rounds the activations as well and
    is wrong for INT2 (docs/deployment.md).
    """
    name = trace.label
    conv, group = (layer if isinstance(layer, IntegerConv) else None), layer.group_size
    if layer.codes is None or layer.weight_step is None:
        assert layer.weight is not None
        own = layer.weight if conv is None else conv.own_layout(layer.weight)
        return graph.constant(f"{name}.weight", np.ascontiguousarray(array(own).T) if turned else array(own))
    codes, steps = array(layer.codes), array(layer.weight_step)
    shape, flat = codes.shape, steps.size == 1
    axis, block = 0, {}
    trace.transposed = lying = turned and group is None and narrow is None
    if lying:
        codes, axis = codes.T, 1
    elif conv is not None and conv.transposed and (flat or conv.groups == 1):
        trace.layout, codes, axis = "own", array(conv.own_layout(layer.codes)), 1
    if group is not None and narrow is not None:
        codes, steps = codes.reshape(shape[0], -1), steps.reshape(shape[0], -1)
        axis, block = 1, {"block_size": group}
    elif group is not None:
        codes = codes.reshape(-1, group)
    byte = np.uint8 if layer.weight_bounds[1] > 127 else np.int8
    dtype = narrow or byte
    if (table := shared_table(graph, layer, trace, byte)) is None:
        trace.weights = [graph.constant(f"{name}.weight", np.ascontiguousarray(codes, dtype))]
        written = trace.weights[0]
    else:
        trace.transposed = False
        written = turned_table(graph, trace, table) if lying else table.name
        if group is not None and narrow is None:
            rows = graph.constant(f"{name}.table_shape", np.array(codes.shape, np.int64))
            written = graph.node("Reshape", [written, rows], f"{graph.prefix}/table", "Reshape_table")
    shaped = steps.reshape(()) if flat else steps
    if not (flat or standard or block):
        shaped = steps.reshape(-1, *[1] * (codes.ndim - 1 - axis))
    operands = [written, weight_steps(graph, trace, shaped, narrow is not None)]
    attributes = {} if flat else {"axis": axis, **block}
    value = f"{graph.prefix}/dequantized_weight"
    if standard or block:
        if narrow is None:
            operands.append(graph.constant(f"{name}.weight_zero_point", np.zeros(() if flat else steps.shape, dtype)))
        graph.node("DequantizeLinear", operands, value, "DequantizeLinear_weight", **attributes)
    else:
        cast = graph.node("Cast", [written], f"{graph.prefix}/float_weight_codes", "Cast_weight", to=FLOAT)
        graph.node("Mul", [cast, operands[1]], value, "Mul_weight")

    def reshaped(to: tuple[int, ...], tag: str = "") -> str:
        target = graph.constant(f"{name}.weight_shape{tag}", np.array(to, np.int64))
        return graph.node("Reshape", [value, target], f"{graph.prefix}/reshaped_weight{tag}", f"Reshape_weight{tag}")

    def swapped(*order: int) -> str:
        return graph.node("Transpose", [value], f"{graph.prefix}/transposed_weight", "Transpose_weight", perm=order)

    if codes.shape != shape and group is not None:
        value = reshaped(shape)
    if turned and not lying:
        value = swapped(1, 0)
    if conv is not None and conv.transposed and not trace.layout:
        value = reshaped((conv.groups, shape[0] // conv.groups, *shape[1:]), "_groups")
        value = swapped(0, 2, 1, *range(3, len(shape) + 1))
        value = reshaped((conv.groups * shape[1], shape[0] // conv.groups, *shape[2:]))
    return value
