"""ONNX models made from a file, to see inside it: with its codes as outputs, and cut into its layers."""

from __future__ import annotations

from typing import Any

from lsquant._util.entry import reason
from lsquant._util.errors import DamagedFile
from lsquant._util.optional import require
from lsquant.formats.onnx.codes import quantize_node
from lsquant.formats.onnx.graph import FLOAT, LayerTrace

MOVING = ("Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape", "Slice", "Split", "Squeeze")
CHOOSING = ("And", "Constant", "Equal", "Greater", "Less", "MaxPool", "Not", "Or", "Sign", "Tile", "Transpose", "Where")
ROUNDING = ("Abs", "Add", "Cast", "Ceil", "Clip", "Div", "Floor", "Max", "Min", "Mul", "Neg", "Relu", "Sqrt", "Sub")
ROUNDED_ONCE = frozenset((*MOVING, "Unsqueeze", *CHOOSING, *ROUNDING))
"""Operators that move values, or round each once, as IEEE 754 says: every runtime gives the same bits."""


def with_outputs(proto: Any, names: list[str], floats: bool = False) -> bytes:
    """Return the model with these values as further outputs, serialized.  floats: whether they are no codes."""
    onnx = require("onnx", extra="onnx")
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    present = {value.name for value in model.graph.output}
    types = value_types(proto, names) if floats else _code_types(proto, names)
    extra = [onnx.helper.make_tensor_value_info(n, types[n], None) for n in names if n not in present]
    model.graph.output.extend(extra)
    return model.SerializeToString()


def layers_alone(proto: Any, layers: list[LayerTrace]) -> bytes:
    """Return a model of the nodes of every layer's call, each between an input and outputs of its own, serialized.

    Call i has the input ``probe/i/input`` and the outputs ``probe/i/codes``, if it has codes, and ``probe/i/output``.

    Raises: DamagedFile where a layer's nodes do not lead from its recorded input to its output.
    """
    onnx = require("onnx", extra="onnx")
    helper = onnx.helper
    makers = {name: node for node in proto.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    types = _code_types(proto, [trace.codes for trace in layers if trace.codes is not None])
    nodes, inputs, outputs, used = [], [], [], set()
    ranks = ranks_of(proto)
    inputs_of = value_types(proto, [trace.input for trace in layers])
    for i, trace in enumerate(layers):
        names = {trace.input: f"probe/{i}/input"}
        if trace.codes is not None:
            names[trace.codes] = f"probe/{i}/codes"
        names[trace.output] = f"probe/{i}/output"
        for node in _between(trace, makers, constants):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"probe/{i}/{node.name}"
            for part in (copy.input, copy.output):
                for k, name in enumerate(part):
                    part[k] = names.get(name, name if name in constants else f"probe/{i}/{name}")
            used |= {name for name in node.input if name in constants}
            nodes.append(copy)
        shape = [None] * ranks[trace.input] if trace.input in ranks else None
        inputs.append(helper.make_tensor_value_info(f"probe/{i}/input", inputs_of[trace.input], shape))
        if trace.codes is not None:
            outputs.append(helper.make_tensor_value_info(f"probe/{i}/codes", types[trace.codes], None))
        outputs.append(helper.make_tensor_value_info(f"probe/{i}/output", FLOAT, None))
    kept = [tensor for name, tensor in constants.items() if name in used]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, kept)
    return helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version).SerializeToString()


def ranks_of(proto: Any) -> dict[str, int]:
    """Return the number of dimensions of each value for which shape inference finds it.

    Raises: DamagedFile where the file's shapes contradict each other.
    """
    # a value of unknown rank has no shape, which is not the shape of a scalar
    found = {name: len(tensor.shape.dim) for name, tensor in _inferred(proto).items() if tensor.HasField("shape")}
    return found | {tensor.name: len(tensor.dims) for tensor in proto.graph.initializer}


def value_types(proto: Any, names: list[str]) -> dict[str, int]:
    """Return the element type of each value: float32 where shape inference does not find it.

    Raises: DamagedFile where the file's shapes contradict each other.
    """
    types = {name: tensor.elem_type for name, tensor in _inferred(proto).items()}
    types |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    return {name: types.get(name) or FLOAT for name in names}


def _inferred(proto: Any) -> dict[str, Any]:
    """Return what shape inference finds of each value."""
    onnx = require("onnx", extra="onnx")
    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        raise DamagedFile(f"the file's shapes do not fit together: {reason(error)}") from error
    return {value.name: value.type.tensor_type for value in [*graph.input, *graph.value_info, *graph.output]}


def float_nodes(proto: Any, value: str, ends: set[str]) -> list[Any]:
    """Return the nodes that lead to a value from others, in order of execution.  ends: where to stop."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    found, left = set(), [value]
    while left:
        node = makers.get(left.pop())
        if node is not None and id(node) not in found:
            found.add(id(node))
            left += [name for name in node.input if name not in ends]
    return [node for node in proto.graph.node if id(makers.get(next(iter(node.output), ""))) in found]


def _between(trace: LayerTrace, makers: dict[str, Any], constants: dict[str, Any]) -> list[Any]:
    """Return the nodes that lead from the layer's input to its output, in order of execution."""
    found: dict[int, Any] = {}
    begun: set[int] = set()
    waiting = [(trace.output, False)]
    while waiting:
        name, ready = waiting.pop()
        if not name or name == trace.input or name in constants:
            continue
        node = makers.get(name)
        if node is None:
            raise DamagedFile(f"the file's layer {trace.layer!r} is not connected from its input to its output")
        if ready:
            found[id(node)] = node
        elif id(node) not in begun:
            begun.add(id(node))
            waiting += [(name, True), *((source, False) for source in reversed(node.input))]
    return list(found.values())


def _code_types(proto: Any, names: list[str]) -> dict[str, int]:
    """Return the element type of each value of codes: that of the zero point of the QuantizeLinear that makes it."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    constants = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    types = {}
    for name in names:
        node = quantize_node(name, makers)
        if node is None or len(node.input) < 3 or node.input[2] not in constants:
            raise DamagedFile(f"the file has no QuantizeLinear that makes {name!r}")
        types[name] = constants[node.input[2]]
    return types
