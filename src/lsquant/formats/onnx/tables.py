"""Quantized embeddings: the rows asked for are gathered as codes, and only they are multiplied by their steps.

    indices -> Gather(codes) -> Cast(FLOAT) -> Mul(step)

With a step per row or group the steps are gathered as well; groups are a dimension of their own while they are
multiplied.  In profile qdq one step for all rows is DequantizeLinear.  A table before Gather would be multiplied as a
whole, which runtimes do once, when they load the file: four bytes for every code.

Gather has no 4- or 2-bit types, so codes of such initializers are cast to bytes before it; a runtime may do that once.

Layers that have the weight of an embedding, as the head of a language model, read its initializer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lsquant.formats.onnx.codes import narrow_type, weight_steps
from lsquant.formats.onnx.graph import FLOAT, INT8, UINT8, Graph, LayerTrace, Table, array
from lsquant.shipped import IntegerConv, IntegerEmbedding, IntegerLayer


def integer_storage(layer: IntegerLayer) -> tuple[type, int]:
    """Return (type, shift) in which codes of a weight are stored for an integer operator.

    No product of an 8-bit unsigned and an 8-bit signed number may occur (``exact.py``).
    """
    low, high = layer.weight_bounds
    if isinstance(layer, IntegerConv) or low < -64 or high > 63:
        return np.uint8, max(-low, 0)
    return np.int8, 0


def tables(layers: dict[str, Any], profile: str, opset: int) -> dict[Any, Table]:
    """Return the table of every embedding by the quantizer of its weight.

    layers: name -> frozen layer.
    opset: of the file.

    It is stored as MatMulInteger wants it, where a layer that has the same weight is one.
    """
    found: dict[Any, Table] = {}
    for name, layer in layers.items():
        quantizer = getattr(layer, "weight_quantizer", None)
        if not isinstance(layer, IntegerEmbedding) or quantizer in found:
            continue
        assert quantizer is not None
        readers = [m for m in layers.values() if getattr(m, "weight_quantizer", None) is quantizer]
        multiplied = next((m for m in readers if m.scale is not None and profile != "qdq"), None)
        low, high = layer.weight_bounds
        dtype, shift = (np.uint8 if high > 127 else np.int8, 0) if multiplied is None else integer_storage(multiplied)
        stored = (array(quantizer.codes).astype(np.int16) + shift).astype(dtype)
        narrow = narrow_type(low + shift, high + shift, opset if profile == "small" else 0)
        found[quantizer] = Table(f"{name or 'model'}.weight", stored, shift, narrow)
    return found


def write_rows(graph: Graph, layer: IntegerEmbedding, trace: LayerTrace, rank: int, profile: str) -> None:
    """Write the nodes of an embedding.

    rank: of the indices.
    """
    table, prefix = graph.tables[layer.weight_quantizer], graph.prefix
    assert layer.weight_step is not None
    steps = array(layer.weight_step)
    count, size = table.stored.shape
    rows = graph.node("Gather", [_bytes(graph, trace, table), trace.input], f"{prefix}/rows", axis=0)
    groups = 0 if steps.size == 1 else steps.size // count
    shaped = steps.reshape((count, groups, 1) if groups > 1 else (count, 1) if groups else ())
    step = weight_steps(graph, trace, shaped, profile == "small")
    if not groups and profile == "qdq":
        point = graph.constant(f"{trace.label}.weight_zero_point", table.stored.dtype.type(table.shift))
        graph.node("DequantizeLinear", [rows, step, point], trace.output)
        return
    value = graph.node("Cast", [rows], f"{prefix}/float_codes", to=FLOAT)
    if table.shift:
        shift = graph.constant(f"{trace.label}.shift", np.float32(table.shift))
        value = graph.node("Sub", [value, shift], f"{prefix}/centred")
    if groups:
        step = graph.node("Gather", [step, trace.input], f"{prefix}/steps", "Gather_steps")
    if groups < 2:
        graph.node("Mul", [value, step], trace.output)
        return
    value = _reshaped(graph, value, (*[0] * rank, groups, size // groups), f"{prefix}/groups")
    value = graph.node("Mul", [value, step], f"{prefix}/scaled")
    _reshaped(graph, value, (*[0] * rank, size), trace.output)


def shared_table(graph: Graph, layer: IntegerLayer, trace: LayerTrace, byte: type) -> Table | None:
    """Let a layer read the table of an embedding that has its weight, where it wants codes as they are stored there.

    trace: ``weight_shift`` is that of the layer's operator.
    byte: the type of its codes.
    """
    table = graph.tables.get(layer.weight_quantizer)
    if table is None or (table.shift, table.stored.dtype) != (trace.weight_shift, byte):
        return None
    trace.weights = [_constant(graph, table)]
    return table


def turned_table(graph: Graph, trace: LayerTrace, table: Table) -> str:
    """Write the codes of a table as bytes (in, out)."""
    codes = _bytes(graph, trace, table)
    return graph.node("Transpose", [codes], f"{graph.prefix}/turned_table", "Transpose_table", perm=(1, 0))


def _constant(graph: Graph, table: Table) -> str:
    return graph.constant(table.name, np.ascontiguousarray(table.stored, table.narrow or table.stored.dtype))


def _bytes(graph: Graph, trace: LayerTrace, table: Table) -> str:
    """Return the value with the codes of a table as bytes: its initializer, or the Cast of that."""
    trace.weights, trace.weight_shift = [_constant(graph, table)], table.shift
    if table.narrow is None:
        return table.name
    byte = UINT8 if table.stored.dtype == np.uint8 else INT8
    return graph.node("Cast", [table.name], f"{graph.prefix}/table_codes", "Cast_table", to=byte)


def _reshaped(graph: Graph, value: str, shape: tuple[int, ...], output: str) -> str:
    target = graph.constant(f"int64_shape_{'_'.join(map(str, shape))}", np.array(shape, np.int64))
    return graph.node("Reshape", [value, target], output, f"Reshape_{output.rpartition('/')[2]}")
