"""Marked nodes -> standard ONNX operators, one small group of nodes per quantized layer.

Both forms quantize by ``QuantizeLinear``, which divides and rounds half to even as section 1 of the mathematics asks.

exact: activations are stored as uint8, signed codes as code + 128; weights of at most 7 bits as int8, of 8 bits as
uint8 code + 128.  So no product of an 8-bit unsigned and an 8-bit signed number occurs: on x86 without VNNI a pair of
those saturates at 16 bits in ONNX Runtime.  The zero points take the 128 out again, exactly.

    x -> QuantizeLinear -> Clip -> ConvInteger | MatMulInteger -> Cast(FLOAT) -> Mul(fl(s_x s_w)) -> Add(bias)

qdq: int8 containers (uint8 for 8-bit unsigned codes); codes of fewer bits are held in range by a float Clip before
QuantizeLinear at ``(q - z) s``, which rounds back to q, so that Q and DQ stay neighbours.

    x -> Clip -> QuantizeLinear -> DequantizeLinear -> Conv | Gemm | MatMul(DequantizeLinear(codes)) + bias
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from lsquant._util.errors import UsageError
from lsquant._util.optional import require
from lsquant.integer import FrozenQuantizer, IntegerConv, IntegerLayer

FLOAT = 1  # onnx.TensorProto.FLOAT


def array(t: Tensor) -> np.ndarray:
    """A contiguous NumPy copy."""
    return np.ascontiguousarray(t.detach().cpu().numpy())


@dataclass
class Graph:
    """Nodes and initializers being written.  prefix: what the names of the present layer's nodes begin with."""

    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    prefix: str = ""

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """An initializer, written once however often it is asked for."""
        self.constants[name] = np.asarray(value)
        return name

    def node(self, operator: str, inputs: list[str], output: str, label: str = "", **attributes: Any) -> str:
        """A node ``prefix/label`` with one output ``output``, which is returned."""
        name = f"{self.prefix}/{label or operator}"
        helper = require("onnx", extra="onnx").helper
        self.nodes.append(helper.make_node(operator, inputs, [output], name, **attributes))
        return output


@dataclass
class Facts:
    """Where the parts of one layer's call are found in the file; goes into its metadata as JSON.

    offset and weight_offset: what was added to the codes for storage.  weights: initializers of the codes, in the order
    of their groups.  transposed: stored (in, out).  scales: initializers of fl(s_x s_w); weight_steps: of s_w.
    """

    layer: str
    call: int
    input: str
    output: str
    codes: str | None = None
    offset: int = 0
    input_step: str | None = None
    weights: list[str] = field(default_factory=list)
    weight_offset: int = 0
    transposed: bool = False
    scales: list[str] = field(default_factory=list)
    weight_steps: list[str] = field(default_factory=list)


def lower(graph: Graph, layer: Any, facts: Facts, rank: int, profile: str) -> None:
    """Write the nodes of one call of a frozen layer from ``facts.input`` to ``facts.output``; fills in ``facts``.

    rank: dimensions of the input and of the output.  Raises: UsageError where the profile has no form for the layer.
    """
    name = facts.layer or "model"
    graph.prefix = name if facts.call == 0 else f"{name}#{facts.call + 1}"
    if isinstance(layer, FrozenQuantizer):
        codes = quantize_in_float_range(graph, layer, facts, name)
        dequantize(graph, codes, layer, name, facts.output, rank, standard=profile == "qdq")
    elif profile == "exact" and layer.scale is not None:
        _exact(graph, layer, facts, name)
    else:
        _qdq(graph, layer, facts, name, rank)


# ---- exact ----


def _exact(graph: Graph, layer: IntegerLayer, facts: Facts, name: str) -> None:
    source, codes, scale = layer.input, layer.codes, layer.scale
    assert source is not None
    assert codes is not None
    assert scale is not None
    facts.offset = 128 if source.q_min < 0 else 0
    zero = 0 if source.zero_point is None else int(source.zero_point.item())
    step = facts.input_step = graph.constant(f"{name}.input_step", array(source.step).reshape(()))
    point = graph.constant(f"{name}.input_zero_point", np.uint8(zero + facts.offset))
    low, high = source.q_min + facts.offset, source.q_max + facts.offset
    full = (low, high) == (0, 255)
    facts.codes = f"{graph.prefix}/codes"
    q = graph.node("QuantizeLinear", [facts.input, step, point], facts.codes if full else f"{graph.prefix}/rounded")
    if not full:
        limits = [graph.constant(f"uint8_{n}", np.uint8(n)) for n in (low, high)]
        q = graph.node("Clip", [q, *limits], facts.codes)
    wide = layer.weight_bounds[0] < -64 or layer.weight_bounds[1] > 63
    facts.weight_offset = 128 if wide and layer.weight_bounds[0] < 0 else 0
    dtype = np.uint8 if wide else np.int8
    stored = (array(codes).astype(np.int16) + facts.weight_offset).astype(dtype)
    weight_point = graph.constant(f"{dtype.__name__}_{facts.weight_offset}", dtype(facts.weight_offset))
    if isinstance(layer, IntegerConv):
        if layer.group_size is not None:
            raise UsageError(
                f"{name}: a convolution with group-wise weight steps has no exact form in ONNX; "
                "use granularity='channel' for it, or profile='qdq'"
            )
        facts.weights = [graph.constant(f"{name}.weight", stored)]
        operands = [q, *facts.weights, point, weight_point]
        sums = graph.node("ConvInteger", operands, f"{graph.prefix}/sums", **_geometry(layer))
        facts.scales = [graph.constant(f"{name}.scale", _per_channel(array(scale)))]
        y = _scaled(graph, sums, facts.scales[0], "")
    else:
        facts.transposed = True
        y = _matmul_integer(graph, layer, facts, name, q, point, stored, weight_point)
    _add_bias(graph, layer, facts, name, y)


def _matmul_integer(
    graph: Graph,
    layer: IntegerLayer,
    facts: Facts,
    name: str,
    q: str,
    point: str,
    stored: np.ndarray,
    weight_point: str,
) -> str:
    """One MatMulInteger, or one a group whose scaled sums are added in the order of the groups."""
    assert layer.scale is not None
    count = 1 if layer.group_size is None else stored.shape[1] // layer.group_size
    scales = array(layer.scale).reshape(-1, count)
    parts = [q] if count == 1 else _split(graph, q, count, stored.shape[1] // count)
    total = ""
    for g, (part, block) in enumerate(zip(parts, np.split(stored, count, axis=1), strict=True)):
        suffix = "" if count == 1 else f".group{g}"
        weight = graph.constant(f"{name}.weight{suffix}", np.ascontiguousarray(block.T))
        scale = graph.constant(f"{name}.scale{suffix}", scales[:, g] if scales.shape[0] > 1 else scales[0, g])
        facts.weights.append(weight)
        facts.scales.append(scale)
        tag = suffix.replace(".", "_")
        sums = graph.node(
            "MatMulInteger", [part, weight, point, weight_point], f"{graph.prefix}/sums{tag}", f"MatMulInteger{tag}"
        )
        y = _scaled(graph, sums, scale, tag)
        total = y if g == 0 else graph.node("Add", [total, y], f"{graph.prefix}/total{tag}", f"Add{tag}")
    return total


def _split(graph: Graph, q: str, count: int, size: int) -> list[str]:
    """Slices of the last dimension."""
    axis = graph.constant("int64_last_axis", np.array([-1], np.int64))
    edges = [graph.constant(f"int64_{g * size}", np.array([g * size], np.int64)) for g in range(count + 1)]
    return [
        graph.node("Slice", [q, edges[g], edges[g + 1], axis], f"{graph.prefix}/codes_group{g}", f"Slice_group{g}")
        for g in range(count)
    ]


def _scaled(graph: Graph, sums: str, scale: str, tag: str) -> str:
    as_float = graph.node("Cast", [sums], f"{graph.prefix}/float_sums{tag}", f"Cast{tag}", to=FLOAT)
    return graph.node("Mul", [as_float, scale], f"{graph.prefix}/scaled{tag}", f"Mul{tag}")


def _add_bias(graph: Graph, layer: IntegerLayer, facts: Facts, name: str, y: str) -> None:
    """The last node, renamed to end at the layer's output where there is no bias."""
    if layer.bias is None:
        graph.nodes[-1].output[0] = facts.output
        return
    values = array(layer.bias)
    shaped = values.reshape(-1, 1, 1) if isinstance(layer, IntegerConv) else values
    graph.node("Add", [y, graph.constant(f"{name}.bias", shaped)], facts.output, "Add_bias")


def _per_channel(values: np.ndarray) -> np.ndarray:
    return values.reshape(()) if values.size == 1 else values.reshape(-1, 1, 1)


def _geometry(layer: IntegerConv) -> dict[str, Any]:
    """Attributes of a convolution, in any of ONNX' operators."""
    before, after = zip(*layer.node_padding, strict=True)
    return {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "pads": [*before, *after],
        "dilations": layer.dilation,
        "group": layer.groups,
    }


# ---- quantize, dequantize ----


def quantize_in_float_range(graph: Graph, source: FrozenQuantizer, facts: Facts, name: str) -> str:
    """Codes in an int8 container (uint8 for 8-bit unsigned).

    The range is held by a float Clip, or by an integer Clip after rounding where there is a step per channel.
    """
    dtype = np.uint8 if source.q_max > 127 else np.int8
    steps = array(source.step)
    zero = np.zeros(steps.size, np.int32) if source.zero_point is None else array(source.zero_point)
    narrow = (source.q_min, source.q_max) != (np.iinfo(dtype).min, np.iinfo(dtype).max)
    x = facts.input
    axis: dict[str, Any] = {}
    if steps.size > 1:
        axis = {"axis": source.axis}
    else:
        steps, zero = steps.reshape(()), zero.reshape(())
        if narrow:
            edges = [np.float32(q - int(zero)) * np.float32(steps) for q in (source.q_min, source.q_max)]
            limits = [
                graph.constant(f"{name}.{edge}", np.float32(value))
                for edge, value in zip(("lowest", "highest"), edges, strict=True)
            ]
            x = graph.node("Clip", [x, *limits], f"{graph.prefix}/clipped")
    step = facts.input_step = graph.constant(f"{name}.input_step", steps)
    point = graph.constant(f"{name}.input_zero_point", zero.astype(dtype))
    facts.codes = f"{graph.prefix}/codes"
    per_channel = bool(axis) and narrow
    rounded = f"{graph.prefix}/rounded" if per_channel else facts.codes
    q = graph.node("QuantizeLinear", [x, step, point], rounded, **axis)
    if per_channel:
        limits = [graph.constant(f"{dtype.__name__}_{n}", dtype(n)) for n in (source.q_min, source.q_max)]
        q = graph.node("Clip", [q, *limits], facts.codes)
    return q


def dequantize(
    graph: Graph, codes: str, source: FrozenQuantizer, name: str, output: str, rank: int, standard: bool
) -> str:
    """``(code - z) * s`` back in float32: DequantizeLinear, or else Cast, Sub, Mul.

    The second form is for a quantized input beside a float weight: ONNX Runtime takes DequantizeLinear before a float
    weight, and QuantizeLinear after it, as the leave to quantize that weight by itself.
    """
    if standard:
        axis: dict[str, Any] = {"axis": source.axis} if source.step.numel() > 1 else {}
        return graph.node("DequantizeLinear", [codes, f"{name}.input_step", f"{name}.input_zero_point"], output, **axis)
    value = graph.node("Cast", [codes], f"{graph.prefix}/float_codes", to=FLOAT)
    trailing = [1] * (0 if source.axis is None else rank - 1 - source.axis % rank)
    if source.zero_point is not None:
        zero = array(source.zero_point).astype(np.float32).reshape(-1, *trailing)
        value = graph.node("Sub", [value, graph.constant(f"{name}.zero", zero)], f"{graph.prefix}/centred")
    step = graph.constant(f"{name}.step", array(source.step).reshape(-1, *trailing))
    return graph.node("Mul", [value, step], output)


# ---- qdq ----


def _qdq(graph: Graph, layer: IntegerLayer, facts: Facts, name: str, rank: int) -> None:
    x = facts.input
    if layer.input is not None:
        codes = quantize_in_float_range(graph, layer.input, facts, name)
        standard = layer.codes is not None
        x = dequantize(graph, codes, layer.input, name, f"{graph.prefix}/dequantized", rank, standard)
    product = f"{graph.prefix}/product"
    if isinstance(layer, IntegerConv):
        graph.node("Conv", [x, _weight(graph, layer, facts, name, transposed=False)], product, **_geometry(layer))
    elif rank == 2:
        graph.node("Gemm", [x, _weight(graph, layer, facts, name, transposed=False)], product, transB=1)
    else:
        graph.node("MatMul", [x, _weight(graph, layer, facts, name, transposed=True)], product)
    _add_bias(graph, layer, facts, name, product)


def _weight(graph: Graph, layer: IntegerLayer, facts: Facts, name: str, transposed: bool) -> str:
    """The float weight: an initializer, or DequantizeLinear of the codes; (in, out) where transposed."""
    turn = lambda values: np.ascontiguousarray(values.T) if transposed else values  # noqa: E731
    if layer.codes is None or layer.weight_step is None:
        assert layer.weight is not None
        return graph.constant(f"{name}.weight", turn(array(layer.weight)))
    codes, steps = array(layer.codes), array(layer.weight_step)
    dtype = np.uint8 if layer.weight_bounds[1] > 127 else np.int8
    facts.transposed = transposed and layer.group_size is None
    flat = steps.size == 1
    stored = codes.astype(dtype) if layer.group_size is None else codes.astype(dtype).reshape(-1, layer.group_size)
    weight = graph.constant(f"{name}.weight", turn(stored) if facts.transposed else stored)
    step = graph.constant(f"{name}.weight_step", steps.reshape(()) if flat else steps)
    point = graph.constant(f"{name}.weight_zero_point", np.zeros(() if flat else steps.shape, dtype))
    facts.weights, facts.weight_steps = [weight], [step]
    axis = {} if flat else {"axis": 1 if facts.transposed else 0}
    value = f"{graph.prefix}/dequantized_weight"
    graph.node("DequantizeLinear", [weight, step, point], value, "DequantizeLinear_weight", **axis)
    if layer.group_size is None:
        return value
    shape = graph.constant(f"{name}.weight_shape", np.array(codes.shape, np.int64))
    value = graph.node("Reshape", [value, shape], f"{graph.prefix}/reshaped_weight", "Reshape_weight")
    if not transposed:
        return value
    return graph.node("Transpose", [value], f"{graph.prefix}/transposed_weight", "Transpose_weight", perm=[1, 0])
