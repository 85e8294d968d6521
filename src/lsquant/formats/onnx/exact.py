"""A layer as an exact sum of integers, then ``Mul(fl(s_x s_w))`` and ``Add(bias)``.

A convolution adds its codes up in float32 wherever no sum can leave 2^24, below which float32 has all integers:
whatever the order, nothing is rounded, and ONNX Runtime takes half the time of ConvInteger or less.  The Clip of the
sums to +-2^24 changes none and costs nothing, for it is fused with Conv; it keeps a runtime from drawing the scale
into the weights:

    x -> QuantizeLinear -> Clip -> Cast(FLOAT) -> Sub(zero point) -> Conv(Cast(FLOAT)(codes)) -> Clip
      -> Mul(fl(s_x s_w)) -> Add(bias)

Other convolutions and linear layers take integer operators: activations as uint8, signed codes as code + 128; weights
of convolutions, and of linear layers with 8 bits, as uint8 ``code - q_min``, else as int8.  So no product of an 8-bit
unsigned and an 8-bit signed number occurs: on x86 without VNNI a pair of those saturates at 16 bits in ONNX Runtime.
The zero points take the shifts out again, exactly.  (ConvInteger with int8 weights is four times slower there, and
missing in older releases.)

    x -> QuantizeLinear -> Clip -> ConvInteger | MatMulInteger -> Cast(FLOAT) -> Mul(fl(s_x s_w)) -> Add(bias)

These operators add up in int32.  ``sums.py`` finds from the trained codes whether a sum can leave it.  Such a sum is
split along its terms, and the parts are added in float64, which has all integers that occur:

    q -> Slice -> MatMulInteger -> Cast(DOUBLE) -> Add ... -> Cast(FLOAT) -> Mul(fl(s_x s_w)) -> Add(bias)

A transposed convolution is one with reversed kernels over codes between which stride - 1 zero points are put.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lsquant._util.errors import UsageError
from lsquant.formats.onnx.codes import Clip, narrow_type, quantize, zero_point_name
from lsquant.formats.onnx.graph import DOUBLE, FLOAT, INT8, UINT8, Dims, Graph, LayerTrace, array
from lsquant.formats.onnx.operators import add_bias, geometry, output_padding, per_channel
from lsquant.formats.onnx.sums import FLOAT_SUMS, Operands, largest_sum, split_terms
from lsquant.formats.onnx.tables import integer_storage, shared_table, turned_table
from lsquant.shipped import FrozenQuantizer, IntegerConv, IntegerLayer


def write_exact(
    graph: Graph, layer: IntegerLayer, trace: LayerTrace, shapes: tuple[Dims, Dims], narrow_opset: int
) -> None:
    """Write the nodes of a layer quantized in both sides.

    shapes: of input and output.
    narrow_opset: the file's operator set where weights may have 4 or 2 bits, else 0.
    """
    source, codes = layer.input, layer.codes
    assert source is not None
    assert codes is not None
    in_float = isinstance(layer, IntegerConv) and largest_sum(layer) < FLOAT_SUMS
    signed = source.q_min < 0
    container, shift = (np.int8, 0) if in_float and signed else (np.uint8, 128 if signed and not in_float else 0)
    q = quantize(graph, source, trace, container, Clip.AFTER, shift)
    low, high = layer.weight_bounds
    if in_float:
        dtype: type = np.uint8 if high > 127 else np.int8
    else:
        dtype, trace.weight_shift = integer_storage(layer)
    narrow = narrow_type(low + trace.weight_shift, high + trace.weight_shift, narrow_opset)
    stored = (array(codes).astype(np.int16) + trace.weight_shift).astype(dtype)
    point = _zero_point(source) + shift
    operands = Operands(q, source.q_max + shift + abs(point), stored, trace.weight_shift, narrow)
    if isinstance(layer, IntegerConv):
        y = _convolution(graph, layer, trace, shapes, operands, in_float)
    else:
        y = _matmul_integer(graph, layer, trace, operands)
    add_bias(graph, layer, trace, y)


def _zero_point(source: FrozenQuantizer) -> int:
    return 0 if source.zero_point is None else int(source.zero_point.item())


def _convolution(
    graph: Graph, layer: IntegerConv, trace: LayerTrace, shapes: tuple[Dims, Dims], operands: Operands, in_float: bool
) -> str:
    """Write Conv over codes in float32, or ConvInteger, and the scale."""
    name, scale, attributes = trace.label, layer.scale, geometry(layer)
    assert scale is not None
    q, stored, narrow = operands.q, operands.stored, operands.narrow
    if layer.transposed:
        trace.layout, stored = "reversed", np.flip(stored, tuple(range(2, stored.ndim)))
        q = _spread(graph, layer, trace, q, shapes)
        attributes |= {"strides": [1] * len(layer.stride), "pads": [0] * len(attributes["pads"])}
    if in_float:
        assert layer.input is not None
        zero = _zero_point(layer.input)
        weight = _weight(graph, trace, f"{name}.weight", stored, narrow, to=FLOAT)
        q = graph.node("Cast", [q], f"{graph.prefix}/float_codes", "Cast_codes", to=FLOAT)
        if zero:
            q = graph.node("Sub", [q, graph.constant(f"{name}.zero", np.float32(zero))], f"{graph.prefix}/centred")
        product = graph.node("Conv", [q, weight], f"{graph.prefix}/product", **attributes)
        limits = [graph.constant(f"float32_{n}", np.float32(n)) for n in (-FLOAT_SUMS, FLOAT_SUMS)]
        sums = graph.node("Clip", [product, *limits], f"{graph.prefix}/sums", "Clip_sums")
    else:
        operands = operands._replace(q=q, stored=stored)
        edges = split_terms(operands, trace.label)
        slices = [
            (_channels(graph, trace, operands, layer.groups, a, b, len(edges) > 2), operands.stored[:, a:b])
            for a, b in itertools.pairwise(edges)
        ]
        sums = _integer_sums(graph, trace, "ConvInteger", slices, operands.narrow, "", attributes)
    trace.scales = [graph.constant(f"{name}.scale", per_channel(array(scale), layer))]
    return graph.node("Mul", [sums, trace.scales[0]], f"{graph.prefix}/scaled")


def _channels(graph: Graph, trace: LayerTrace, operands: Operands, groups: int, a: int, b: int, part: bool) -> str:
    """Write the codes of the input channels a to b of every group; all of them where it is no part."""
    if not part:
        return operands.q
    size = operands.stored.shape[1]
    wanted = np.concatenate([np.arange(g * size + a, g * size + b) for g in range(groups)])
    indices = graph.constant(f"{trace.label}.channels.part{a}", wanted.astype(np.int64))
    return graph.node("Gather", [operands.q, indices], f"{graph.prefix}/codes_part{a}", f"Gather_part{a}", axis=1)


def _integer_sums(
    graph: Graph,
    trace: LayerTrace,
    operator: str,
    slices: list[tuple[str, np.ndarray]],
    narrow: Any,
    suffix: str,
    attributes: dict[str, Any],
    written: Sequence[str] = (),
) -> str:
    """Write one integer operator for each slice of the terms, and their sum as float32.

    slices: (codes of the input, those of the weight).
    written: the values with the latter, where they are in the graph already.
    suffix: of the names, "" or that of a group of weights.
    """
    total = ""
    for number, (q, block) in enumerate(slices):
        end = suffix if len(slices) == 1 else f"{suffix}.part{number}"
        tag = end.replace(".", "_")
        weight = written[number] if written else _weight(graph, trace, f"{trace.label}.weight{end}", block, narrow)
        operands = [q, weight, zero_point_name(trace), _weight_point(graph, trace, block.dtype)]
        sums = graph.node(operator, operands, f"{graph.prefix}/int_sums{tag}", f"{operator}{tag}", **attributes)
        if len(slices) == 1:
            return graph.node("Cast", [sums], f"{graph.prefix}/sums{tag}", f"Cast{tag}", to=FLOAT)
        part = graph.node("Cast", [sums], f"{graph.prefix}/wide_sums{tag}", f"Cast_wide{tag}", to=DOUBLE)
        total = part if not total else graph.node("Add", [total, part], f"{graph.prefix}/all{tag}", f"Add_wide{tag}")
    tag = suffix.replace(".", "_")
    return graph.node("Cast", [total], f"{graph.prefix}/sums{tag}", f"Cast{tag}", to=FLOAT)


def _weight_point(graph: Graph, trace: LayerTrace, dtype: np.dtype) -> str:
    """Return the zero point of the weight, which takes its shift out again."""
    return graph.constant(f"{dtype.name}_{trace.weight_shift}", dtype.type(trace.weight_shift))


def _weight(graph: Graph, trace: LayerTrace, name: str, stored: np.ndarray, narrow: Any, to: int | None = None) -> str:
    """Return the value with the codes of a weight: an initializer, or its Cast from 4 or 2 bits or to a type.

    narrow: the type of ml_dtypes with 4 or 2 bits, or None.
    to: the type of ONNX that the operator wants, None for the byte of ``stored``.
    """
    trace.weights.append(graph.constant(name, np.ascontiguousarray(stored, narrow or stored.dtype)))
    if narrow is None and to is None:
        return name
    tag = name.rpartition(".weight")[2].replace(".", "_")
    byte = UINT8 if stored.dtype == np.uint8 else INT8
    return graph.node("Cast", [name], f"{graph.prefix}/weight{tag}", f"Cast_weight{tag}", to=to or byte)


def _spread(graph: Graph, layer: IntegerConv, trace: LayerTrace, q: str, shapes: tuple[Dims, Dims]) -> str:
    """Write codes with stride - 1 zero points between neighbours, padded.

    A convolution over them is the transposed one.

    Raises: UsageError for images of free size.
    """
    name, point, sizes = trace.label, zero_point_name(trace), shapes[0][2:]
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
        wanted = graph.constant(f"{name}.spread_shape", np.array(shape))
        q = graph.node("Reshape", [q, wanted], f"{graph.prefix}/spread")
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    before = [r - a for r, (a, _) in zip(reach, layer.padding, strict=True)]
    extra = output_padding(layer, shapes)
    after = [r - b + e - s + 1 for r, (_, b), e, s in zip(reach, layer.padding, extra, layer.stride, strict=True)]
    pads = graph.constant(f"{name}.pads", np.array([0, 0, *before, 0, 0, *after]))
    return graph.node("Pad", [q, pads, point], f"{graph.prefix}/padded")


def _matmul_integer(graph: Graph, layer: IntegerLayer, trace: LayerTrace, operands: Operands) -> str:
    """Write one MatMulInteger, or one per group; the scaled sums of groups are added in the order of the groups."""
    assert layer.scale is not None
    name, stored = trace.label, operands.stored
    table = shared_table(graph, layer, trace, stored.dtype.type)
    shared = "" if table is None else turned_table(graph, trace, table)
    trace.transposed = table is None
    count = 1 if layer.group_size is None else stored.shape[1] // layer.group_size
    size = stored.shape[1] // count
    scales = array(layer.scale).reshape(-1, count)
    total = ""
    for g in range(count):
        suffix = "" if count == 1 else f".group{g}"
        block = stored[:, g * size : (g + 1) * size]
        edges = split_terms(operands._replace(stored=block), trace.label)
        slices = [
            (_features(graph, operands.q, g * size + a, g * size + b, stored.shape[1]), block[:, a:b].T)
            for a, b in itertools.pairwise(edges)
        ]
        terms = [(g * size + a, g * size + b) for a, b in itertools.pairwise(edges)] if shared else []
        written = [_terms(graph, shared, a, b, stored.shape[1]) for a, b in terms]
        sums = _integer_sums(graph, trace, "MatMulInteger", slices, operands.narrow, suffix, {}, written)
        scale = graph.constant(f"{name}.scale{suffix}", scales[:, g] if scales.shape[0] > 1 else scales[0, g])
        trace.scales.append(scale)
        tag = suffix.replace(".", "_")
        y = graph.node("Mul", [sums, scale], f"{graph.prefix}/scaled{tag}", f"Mul{tag}")
        total = y if g == 0 else graph.node("Add", [total, y], f"{graph.prefix}/total{tag}", f"Add{tag}")
    return total


def _features(graph: Graph, q: str, a: int, b: int, size: int) -> str:
    """Write the codes a to b of the last dimension, which has ``size`` of them."""
    return _slice(graph, q, a, b, size, "last_axis", -1, "")


def _terms(graph: Graph, weight: str, a: int, b: int, size: int) -> str:
    """Write the rows a to b of a weight (in, out), which has ``size`` of them."""
    return _slice(graph, weight, a, b, size, "first_axis", 0, "weight_")


def _slice(graph: Graph, value: str, a: int, b: int, size: int, label: str, axis: int, tag: str) -> str:
    if (a, b) == (0, size):
        return value
    edges = [graph.constant(f"int64_{n}", np.array([n], np.int64)) for n in (a, b)]
    along = graph.constant(f"int64_{label}", np.array([axis], np.int64))
    return graph.node("Slice", [value, *edges, along], f"{graph.prefix}/{tag}codes_{a}_{b}", f"Slice_{tag}{a}_{b}")
