"""Quantizers in standard ONNX operators, and the types that hold codes.

This is the one place where codes of fewer than 8 bits are held in range, because QuantizeLinear knows the bounds of
whole bytes only:

- ``Clip.AFTER``: an integer Clip behind QuantizeLinear.
- ``Clip.BEFORE``: a float Clip before it at ``(q_min - z) s`` and ``(q_max - z) s``, which round back to the bounds, so
  that QuantizeLinear and DequantizeLinear stay neighbours.  With a step per channel the Clip is behind all the same.

Where the container's own bounds are those of the codes there is no Clip.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np

from lsquant._util.optional import require
from lsquant.formats.onnx.graph import FLOAT, Graph, LayerTrace, array
from lsquant.shipped import FrozenQuantizer

NARROW = ((2, 25), (4, 21))
"""(bits of an initializer in profile small, the lowest operator set that has the type)."""


class Clip(Enum):
    """Where codes are held in range."""

    BEFORE = "before QuantizeLinear, in float"
    AFTER = "after QuantizeLinear, in integers"


def quantize(
    graph: Graph, source: FrozenQuantizer, trace: LayerTrace, container: type, clip: Clip, shift: int = 0
) -> str:
    """Add the nodes from ``trace.input`` to its codes, all within ``q_min + shift .. q_max + shift``.

    source: the quantizer.
    container: numpy.uint8 or numpy.int8, the type of the codes in the file.
    shift: what is added to the codes for storage.

    Returns the name of the codes; ``trace`` is told it, the shift and the name of the step.
    """
    name, x = trace.label, trace.input
    low, high = source.q_min + shift, source.q_max + shift
    steps = array(source.step)
    zero = np.zeros(steps.size, np.int32) if source.zero_point is None else array(source.zero_point)
    axis: dict[str, Any] = {"axis": source.axis} if steps.size > 1 else {}
    if not axis:
        steps, zero = steps.reshape(()), zero.reshape(())
    held = (low, high) == (np.iinfo(container).min, np.iinfo(container).max)
    if not held and clip is Clip.BEFORE and not axis:
        edges = [np.float32(q - int(zero)) * np.float32(steps) for q in (source.q_min, source.q_max)]
        limits = [
            graph.constant(f"{name}.{edge}", np.float32(value))
            for edge, value in zip(("lowest", "highest"), edges, strict=True)
        ]
        x = graph.node("Clip", [x, *limits], f"{graph.prefix}/clipped")
        held = True
    trace.stored_shift = shift
    trace.input_step = graph.constant(f"{name}.input_step", steps)
    point = graph.constant(zero_point_name(trace), (zero + shift).astype(container))
    trace.codes = f"{graph.prefix}/codes"
    rounded = trace.codes if held else f"{graph.prefix}/rounded"
    codes = graph.node("QuantizeLinear", [x, trace.input_step, point], rounded, **axis)
    if held:
        return codes
    limits = [graph.constant(f"{container.__name__}_{n}", container(n)) for n in (low, high)]
    return graph.node("Clip", [codes, *limits], trace.codes)


def zero_point_name(trace: LayerTrace) -> str:
    """Return the name of the initializer of the input's zero point, shifted as the codes are."""
    return f"{trace.label}.input_zero_point"


def quantize_node(codes: str, makers: dict[str, Any]) -> Any:
    """Return the QuantizeLinear that makes the codes of this name, or None.  makers: value name -> node."""
    node = makers.get(codes)
    if node is not None and node.op_type == "Clip" and node.input:
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def quantize_to_bytes(graph: Graph, source: FrozenQuantizer, trace: LayerTrace) -> str:
    """Add the codes in an int8 container, or uint8 for unsigned codes of 8 bits, as QuantizeLinear leaves them."""
    return quantize(graph, source, trace, np.uint8 if source.q_max > 127 else np.int8, Clip.BEFORE)


def dequantize(
    graph: Graph, codes: str, source: FrozenQuantizer, trace: LayerTrace, output: str, rank: int, standard: bool
) -> str:
    """Add ``(code - z) * s`` in float32: DequantizeLinear, or else Cast, Sub, Mul.

    The second form is for a quantized input beside a float weight: ONNX Runtime takes DequantizeLinear before a float
    weight, and QuantizeLinear after it, as a licence to quantize that weight by itself.

    rank: of the output.
    standard: whether to use DequantizeLinear.
    """
    name = trace.label
    if standard:
        axis: dict[str, Any] = {"axis": source.axis} if source.step.numel() > 1 else {}
        return graph.node("DequantizeLinear", [codes, f"{name}.input_step", zero_point_name(trace)], output, **axis)
    value = graph.node("Cast", [codes], f"{graph.prefix}/float_codes", to=FLOAT)
    trailing = [1] * (0 if source.axis is None else rank - 1 - source.axis % rank)
    if source.zero_point is not None:
        zero = array(source.zero_point).astype(np.float32).reshape(-1, *trailing)
        value = graph.node("Sub", [value, graph.constant(f"{name}.zero", zero)], f"{graph.prefix}/centred")
    step = graph.constant(f"{name}.step", array(source.step).reshape(-1, *trailing))
    return graph.node("Mul", [value, step], output)


def weight_steps(graph: Graph, trace: LayerTrace, steps: np.ndarray, halved: bool) -> str:
    """Return the value with the steps of a weight as float32, and tell ``trace`` their initializer.

    halved: whether steps that are all float16 numbers may be stored as such, and cast: two bytes a step.
    """
    name = f"{trace.label}.weight_step"
    trace.weight_steps = [name]
    with np.errstate(over="ignore"):
        small = steps.astype(np.float16)
    if not halved or steps.size == 1 or not np.array_equal(small.astype(np.float32), steps):
        return graph.constant(name, steps)
    graph.constant(name, small)
    return graph.node("Cast", [name], f"{graph.prefix}/weight_step", "Cast_weight_step", to=FLOAT)


def narrow_type(low: int, high: int, opset: int) -> Any:
    """Return the smallest type of ml_dtypes for codes from low to high, or None where that is a byte."""
    for bits, since in NARROW:
        signed = low < 0
        top = 2 ** (bits - signed) - 1
        if high > low and opset >= since and high <= top and low >= (-top - 1 if signed else 0):
            return getattr(require("ml_dtypes", extra="onnx"), f"{'' if signed else 'u'}int{bits}")
    return None
