"""Marked nodes -> standard ONNX operators, one small group of nodes per quantized layer.

All forms quantize by ``QuantizeLinear``, which divides and rounds half to even as section 1 of the mathematics asks.

exact: a convolution adds its codes up in float32 wherever no sum can leave 2^24 = the integers that float32 has all of:
whatever the order, nothing is rounded, and ONNX Runtime takes half the time of ConvInteger or less.  The Clip of the
sums to +-2^24 changes none and costs nothing, for it is fused with Conv; it keeps a runtime from drawing the scale
into the weights:

    x -> QuantizeLinear -> Clip -> Cast(FLOAT) -> Sub(zero point) -> Conv(Cast(FLOAT)(codes)) -> Clip
      -> Mul(fl(s_x s_w)) -> Add(bias)

Other convolutions and linear layers take integer operators, activations as uint8, signed codes as code + 128; weights
of convolutions, and of linear layers with 8 bits, as uint8 ``code - q_min``, else as int8.  So no product of an 8-bit
unsigned and an 8-bit signed number occurs: on x86 without VNNI a pair of those saturates at 16 bits in ONNX Runtime.
The zero points take the offsets out again, exactly.  (ConvInteger with int8 weights is four times slower there, and
missing in older releases.)

    x -> QuantizeLinear -> Clip -> ConvInteger | MatMulInteger -> Cast(FLOAT) -> Mul(fl(s_x s_w)) -> Add(bias)

A transposed convolution is one with reversed kernels over codes between which stride - 1 zero points are put.

small: as exact, with weights of at most 4 bits as initializers of 4 or 2 bits and a Cast after them; a weight whose
input is not quantized, and a group-wise convolution, by DequantizeLinear as in qdq, groups in blocks.

qdq: int8 containers (uint8 for 8-bit unsigned codes); codes of fewer bits are held in range by a float Clip before
QuantizeLinear at ``(q - z) s``, which rounds back to q, so that Q and DQ stay neighbours.

    x -> Clip -> QuantizeLinear -> DequantizeLinear -> Conv | Gemm | MatMul(DequantizeLinear(codes)) + bias
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lsquant._util.errors import UsageError
from lsquant._util.optional import require
from lsquant.export.graph import FLOAT, Facts, Graph, array, dequantize, quantize_in_float_range
from lsquant.integer import FrozenQuantizer, IntegerConv, IntegerLayer

UINT8, INT8 = 2, 3  # onnx.TensorProto
FLOAT_SUMS = 2**24
"""Sums of integers that stay below this are exact in float32, in any order."""
NARROW = ((2, 25), (4, 21))
"""(bits of an initializer in profile small, the lowest operator set that has the type)."""

Dims = list[int | None]


def lower(graph: Graph, layer: Any, facts: Facts, shapes: tuple[Dims, Dims], profile: str, opset: int) -> None:
    """Write the nodes of one call of a frozen layer from ``facts.input`` to ``facts.output``; fills in ``facts``.

    shapes: of the input and of the output, None for a free dimension.  opset: of the file, which has INT4 or not.
    Raises: UsageError where the profile has no form for the layer.
    """
    name = facts.layer or "model"
    graph.prefix = name if facts.call == 0 else f"{name}#{facts.call + 1}"
    if isinstance(layer, FrozenQuantizer):
        codes = quantize_in_float_range(graph, layer, facts, name)
        rank = len(shapes[1])
        dequantize(graph, codes, layer, name, facts.output, rank, standard=profile == "qdq")
        return
    small = opset if profile == "small" else 0
    grouped = isinstance(layer, IntegerConv) and layer.group_size is not None
    if profile == "qdq" or layer.scale is None or (grouped and small):
        low, high = layer.weight_bounds
        _qdq(graph, layer, facts, name, shapes, narrow_type(low, high, small))
    elif grouped:
        raise UsageError(
            f"{name}: a convolution with group-wise weight steps has no exact form in ONNX; "
            "use granularity='channel' for it, or profile='small' or 'qdq'"
        )
    else:
        _exact(graph, layer, facts, name, shapes, small)


def narrow_type(low: int, high: int, opset: int) -> Any:
    """The smallest type of ml_dtypes for codes from low to high below a byte, or None where a byte it is."""
    for bits, since in NARROW:
        signed = low < 0
        top = 2 ** (bits - signed) - 1
        if high > low and opset >= since and high <= top and low >= (-top - 1 if signed else 0):
            return getattr(require("ml_dtypes", extra="onnx"), f"{'' if signed else 'u'}int{bits}")
    return None


# ---- exact ----


def _exact(graph: Graph, layer: IntegerLayer, facts: Facts, name: str, shapes: tuple[Dims, Dims], small: int) -> None:
    source, codes, scale = layer.input, layer.codes, layer.scale
    assert source is not None
    assert codes is not None
    assert scale is not None
    in_float = isinstance(layer, IntegerConv) and largest_sum(layer) < FLOAT_SUMS
    container = np.int8 if in_float and source.q_min < 0 else np.uint8
    facts.offset = 128 if source.q_min < 0 and not in_float else 0
    zero = 0 if source.zero_point is None else int(source.zero_point.item())
    step = facts.input_step = graph.constant(f"{name}.input_step", array(source.step).reshape(()))
    point = graph.constant(f"{name}.input_zero_point", container(zero + facts.offset))
    low, high = source.q_min + facts.offset, source.q_max + facts.offset
    full = (low, high) == (np.iinfo(container).min, np.iinfo(container).max)
    facts.codes = f"{graph.prefix}/codes"
    q = graph.node("QuantizeLinear", [facts.input, step, point], facts.codes if full else f"{graph.prefix}/rounded")
    if not full:
        limits = [graph.constant(f"{container.__name__}_{n}", container(n)) for n in (low, high)]
        q = graph.node("Clip", [q, *limits], facts.codes)
    low, high = layer.weight_bounds
    if in_float:
        dtype = np.uint8 if high > 127 else np.int8
    else:
        dtype = np.uint8 if isinstance(layer, IntegerConv) or low < -64 or high > 63 else np.int8
        facts.weight_offset = -low if dtype is np.uint8 and low < 0 else 0
    narrow = narrow_type(low + facts.weight_offset, high + facts.weight_offset, small)
    stored = (array(codes).astype(np.int16) + facts.weight_offset).astype(dtype)
    if isinstance(layer, IntegerConv):
        geometry = _geometry(layer)
        if layer.transposed:
            facts.layout, stored = "reversed", np.flip(stored, tuple(range(2, stored.ndim)))
            q = _spread(graph, layer, q, point, name, shapes)
            geometry |= {"strides": [1] * len(layer.stride), "pads": [0] * len(geometry["pads"])}
        if in_float:
            weight = _initializer(graph, facts, f"{name}.weight", stored, narrow, to=FLOAT)
            q = graph.node("Cast", [q], f"{graph.prefix}/float_codes", "Cast_codes", to=FLOAT)
            if zero:
                q = graph.node("Sub", [q, graph.constant(f"{name}.zero", np.float32(zero))], f"{graph.prefix}/centred")
            product = graph.node("Conv", [q, weight], f"{graph.prefix}/product", **geometry)
            limits = [graph.constant(f"float32_{n}", np.float32(n)) for n in (-FLOAT_SUMS, FLOAT_SUMS)]
            sums = graph.node("Clip", [product, *limits], f"{graph.prefix}/sums", "Clip_sums")
        else:
            weight = _initializer(graph, facts, f"{name}.weight", stored, narrow)
            weight_point = graph.constant(f"{dtype.__name__}_{facts.weight_offset}", dtype(facts.weight_offset))
            sums = graph.node("ConvInteger", [q, weight, point, weight_point], f"{graph.prefix}/int_sums", **geometry)
            sums = graph.node("Cast", [sums], f"{graph.prefix}/sums", to=FLOAT)
        facts.scales = [graph.constant(f"{name}.scale", _per_channel(array(scale), layer))]
        y = graph.node("Mul", [sums, facts.scales[0]], f"{graph.prefix}/scaled")
    else:
        facts.transposed = True
        weight_point = graph.constant(f"{dtype.__name__}_{facts.weight_offset}", dtype(facts.weight_offset))
        y = _matmul_integer(graph, layer, facts, name, [q, point, weight_point], stored, narrow)
    _add_bias(graph, layer, facts, name, y)


def largest_sum(layer: IntegerLayer) -> int:
    """``max over outputs of sum |q_w|  *  max |q_x - z|``: no sum of products, nor a part of one, is larger."""
    source, codes = layer.input, layer.codes
    assert source is not None
    assert codes is not None
    zero = 0 if source.zero_point is None else int(source.zero_point.item())
    reach = max(abs(source.q_min - zero), abs(source.q_max - zero))
    return reach * int(np.abs(array(codes).astype(np.int64)).reshape(len(codes), -1).sum(1).max())


def _initializer(graph: Graph, facts: Facts, name: str, stored: np.ndarray, narrow: Any, to: int | None = None) -> str:
    """The value that holds a layer's codes: an initializer, or its Cast from 4 or 2 bits, or to the type `to`."""
    facts.weights.append(graph.constant(name, np.ascontiguousarray(stored, narrow or stored.dtype)))
    if narrow is None and to is None:
        return name
    tag, eight = name.rpartition(".weight")[2].replace(".", "_"), UINT8 if stored.dtype == np.uint8 else INT8
    return graph.node("Cast", [name], f"{graph.prefix}/weight{tag}", f"Cast_weight{tag}", to=to or eight)


def _spread(graph: Graph, layer: IntegerConv, q: str, point: str, name: str, shapes: tuple[Dims, Dims]) -> str:
    """Codes with stride - 1 zero points between neighbours, and padded, so that a convolution is the transposed one."""
    sizes = shapes[0][2:]
    if None in sizes or None in shapes[1][2:]:
        raise UsageError(f"{name}: a transposed convolution over images of free size has no exact form in ONNX yet")
    if any(s > 1 for s in layer.stride):
        count = len(sizes)
        axes = graph.constant(f"int64_odd_axes_{count}", np.arange(3, 3 + 2 * count, 2))
        q = graph.node("Unsqueeze", [q, axes], f"{graph.prefix}/unsqueezed")
        ends = [e for s in layer.stride for e in (0, s - 1)]
        pads = graph.constant(f"{name}.stride_pads", np.array([0] * (4 + 2 * count) + ends))
        q = graph.node("Pad", [q, pads, point], f"{graph.prefix}/with_gaps", "Pad_stride")
        shape = [0, 0, *(n * s for n, s in zip(sizes, layer.stride, strict=True) if n is not None)]
        q = graph.node(
            "Reshape", [q, graph.constant(f"{name}.spread_shape", np.array(shape))], f"{graph.prefix}/spread"
        )
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    before = [r - a for r, (a, _) in zip(reach, layer.padding, strict=True)]
    extra = output_padding(layer, shapes)
    after = [r - b + e - s + 1 for r, (_, b), e, s in zip(reach, layer.padding, extra, layer.stride, strict=True)]
    pads = graph.constant(f"{name}.pads", np.array([0, 0, *before, 0, 0, *after]))
    return graph.node("Pad", [q, pads, point], f"{graph.prefix}/padded")


def output_padding(layer: IntegerConv, shapes: tuple[Dims, Dims]) -> list[int]:
    """What a transposed convolution's output is longer than its least size, from the sizes; the layer's if unknown."""
    extra = list(layer.output_padding)
    sides = zip(*(s[2:] for s in shapes), layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True)
    for i, (n, out, s, (a, b), d, k) in enumerate(sides):
        if n is not None and out is not None:
            extra[i] = out - ((n - 1) * s - a - b + d * (k - 1) + 1)
    return extra


def _matmul_integer(
    graph: Graph, layer: IntegerLayer, facts: Facts, name: str, operands: list[str], stored: np.ndarray, narrow: Any
) -> str:
    """One MatMulInteger, or one a group whose scaled sums are added in the order of the groups.

    operands: codes, their zero point, the weight's.
    """
    assert layer.scale is not None
    q, *points = operands
    count = 1 if layer.group_size is None else stored.shape[1] // layer.group_size
    scales = array(layer.scale).reshape(-1, count)
    parts = [q] if count == 1 else _split(graph, q, count, stored.shape[1] // count)
    total = ""
    for g, (part, block) in enumerate(zip(parts, np.split(stored, count, axis=1), strict=True)):
        suffix = "" if count == 1 else f".group{g}"
        weight = _initializer(graph, facts, f"{name}.weight{suffix}", block.T, narrow)
        scale = graph.constant(f"{name}.scale{suffix}", scales[:, g] if scales.shape[0] > 1 else scales[0, g])
        facts.scales.append(scale)
        tag = suffix.replace(".", "_")
        sums = graph.node(
            "MatMulInteger", [part, weight, *points], f"{graph.prefix}/int_sums{tag}", f"MatMulInteger{tag}"
        )
        sums = graph.node("Cast", [sums], f"{graph.prefix}/sums{tag}", f"Cast{tag}", to=FLOAT)
        y = graph.node("Mul", [sums, scale], f"{graph.prefix}/scaled{tag}", f"Mul{tag}")
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


def _add_bias(graph: Graph, layer: IntegerLayer, facts: Facts, name: str, y: str) -> None:
    """The last node, renamed to end at the layer's output where there is no bias."""
    if layer.bias is None:
        graph.nodes[-1].output[0] = facts.output
        return
    shaped = _per_channel(array(layer.bias), layer, scalar=False)
    graph.node("Add", [y, graph.constant(f"{name}.bias", shaped)], facts.output, "Add_bias")


def _per_channel(values: np.ndarray, layer: IntegerLayer, scalar: bool = True) -> np.ndarray:
    """A value for each output channel, as it is broadcast."""
    if scalar and values.size == 1:
        return values.reshape(())
    return values.reshape(-1, *[1] * len(layer.kernel_size)) if isinstance(layer, IntegerConv) else values


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


# ---- qdq ----


def _qdq(graph: Graph, layer: IntegerLayer, facts: Facts, name: str, shapes: tuple[Dims, Dims], narrow: Any) -> None:
    x, rank = facts.input, len(shapes[1])
    if layer.input is not None:
        codes = quantize_in_float_range(graph, layer.input, facts, name)
        standard = layer.codes is not None
        x = dequantize(graph, codes, layer.input, name, f"{graph.prefix}/dequantized", rank, standard)
    product = f"{graph.prefix}/product"
    weight = _weight(graph, layer, facts, name, narrow, turned=rank != 2 and not isinstance(layer, IntegerConv))
    if isinstance(layer, IntegerConv):
        extra: dict[str, Any] = {"output_padding": output_padding(layer, shapes)} if layer.transposed else {}
        operator = "ConvTranspose" if layer.transposed else "Conv"
        graph.node(operator, [x, weight], product, **_geometry(layer), **extra)
    elif rank == 2:
        graph.node("Gemm", [x, weight], product, transB=1)
    else:
        graph.node("MatMul", [x, weight], product)
    _add_bias(graph, layer, facts, name, product)


def _weight(graph: Graph, layer: IntegerLayer, facts: Facts, name: str, narrow: Any, turned: bool) -> str:
    """The float weight in the operator's own layout: an initializer, or DequantizeLinear of the codes.

    turned: (in, out).  Groups are blocks of DequantizeLinear where narrow is a type, else rows of the stored codes.
    Blocks lie along the second axis: those along the first are fused by ONNX Runtime to MatMulNBits, which rounds the
    activations as well and is wrong for INT2 (docs/deployment.md).
    """
    conv, group = (layer if isinstance(layer, IntegerConv) else None), layer.group_size
    if layer.codes is None or layer.weight_step is None:
        assert layer.weight is not None
        own = layer.weight if conv is None else conv.own_layout(layer.weight)
        return graph.constant(f"{name}.weight", np.ascontiguousarray(array(own).T) if turned else array(own))
    codes, steps = array(layer.codes), array(layer.weight_step)
    shape, flat, axis, block = codes.shape, steps.size == 1, 0, {}
    facts.transposed = turned and group is None and narrow is None
    if facts.transposed:
        codes, axis = codes.T, 1
    elif conv is not None and conv.transposed and (flat or conv.groups == 1):
        facts.layout, codes, axis = "own", array(conv.own_layout(layer.codes)), 1
    if group is not None and narrow is not None:
        codes, steps, axis, block = codes.reshape(shape[0], -1), steps.reshape(shape[0], -1), 1, {"block_size": group}
    elif group is not None:
        codes = codes.reshape(-1, group)
    dtype = narrow or (np.uint8 if layer.weight_bounds[1] > 127 else np.int8)
    facts.weights = [graph.constant(f"{name}.weight", np.ascontiguousarray(codes, dtype))]
    facts.weight_steps = [graph.constant(f"{name}.weight_step", steps.reshape(()) if flat else steps)]
    operands = [*facts.weights, *facts.weight_steps]
    if narrow is None:
        operands.append(graph.constant(f"{name}.weight_zero_point", np.zeros(() if flat else steps.shape, dtype)))
    attributes = {} if flat else {"axis": axis, **block}
    value = f"{graph.prefix}/dequantized_weight"
    graph.node("DequantizeLinear", operands, value, "DequantizeLinear_weight", **attributes)

    def reshaped(to: tuple[int, ...], tag: str = "") -> str:
        target = graph.constant(f"{name}.weight_shape{tag}", np.array(to, np.int64))
        return graph.node("Reshape", [value, target], f"{graph.prefix}/reshaped_weight{tag}", f"Reshape_weight{tag}")

    def swapped(*order: int) -> str:
        return graph.node("Transpose", [value], f"{graph.prefix}/transposed_weight", "Transpose_weight", perm=order)

    if codes.shape != shape and group is not None:
        value = reshaped(shape)
    if turned and not facts.transposed:
        value = swapped(1, 0)
    if conv is not None and conv.transposed and not facts.layout:
        value = reshaped((conv.groups, shape[0] // conv.groups, *shape[1:]), "_groups")
        value = swapped(0, 2, 1, *range(3, len(shape) + 1))
        value = reshaped((conv.groups * shape[1], shape[0] // conv.groups, *shape[2:]))
    return value
