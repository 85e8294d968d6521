"""ONNX Runtime as a judge sees it: the file as it is, with its codes shown, and cut at every layer's input."""

from __future__ import annotations

from typing import Any

import numpy as np

from lsquant._util.errors import DamagedFile
from lsquant._util.optional import require
from lsquant.export.graph import Facts
from lsquant.verification.runtimes import Runtime

UINT8, INT8, FLOAT = 2, 3, 1  # onnx.TensorProto


class OnnxRunner:
    """Three sessions on one file: unmodified, with all codes as outputs, and the layers alone."""

    def __init__(self, runtime: Runtime, path: str, proto: Any, layers: list[Facts], options: dict[str, str]) -> None:
        self.layers = layers
        self.whole = runtime.open(path, options)
        self.inputs = self.whole.inputs
        self.outputs = [value.name for value in proto.graph.output]
        codes = list(dict.fromkeys(fact.codes for fact in layers if fact.codes is not None))
        self.shown = runtime.open(with_outputs(proto, codes), options)
        self.codes = codes
        self.probe = runtime.open(layers_alone(proto, layers), options)

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of the unmodified file."""
        return self.whole.run(self.outputs, feeds)

    def run_codes(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Value name -> stored codes of every quantizer, end to end."""
        return dict(zip(self.codes, self.shown.run(self.codes, feeds), strict=True)) if self.codes else {}

    def run_layers(self, inputs: list[np.ndarray]) -> list[tuple[np.ndarray | None, np.ndarray]]:
        """(stored codes or None, output) of every layer, each fed its own input."""
        feeds = {f"probe/{i}/input": x for i, x in enumerate(inputs)}
        wanted = [f"probe/{i}/{part}" for i, fact in enumerate(self.layers) for part in _parts(fact)]
        got = dict(zip(wanted, self.probe.run(wanted, feeds), strict=True))
        return [(got.get(f"probe/{i}/codes"), got[f"probe/{i}/output"]) for i in range(len(self.layers))]


def _parts(fact: Facts) -> list[str]:
    return ["output"] if fact.codes is None else ["codes", "output"]


def with_outputs(proto: Any, names: list[str]) -> bytes:
    """The model with more outputs."""
    onnx = require("onnx", extra="onnx")
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    present = {value.name for value in model.graph.output}
    types = _code_types(proto, names)
    extra = [onnx.helper.make_tensor_value_info(n, types[n], None) for n in names if n not in present]
    model.graph.output.extend(extra)
    return model.SerializeToString()


def layers_alone(proto: Any, layers: list[Facts]) -> bytes:
    """The nodes of every layer's call, each between an input and outputs of its own.

    Raises: DamagedFile where a layer's nodes do not lead from its recorded input to its output.
    """
    onnx = require("onnx", extra="onnx")
    helper = onnx.helper
    makers = {name: node for node in proto.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    types = _code_types(proto, [fact.codes for fact in layers if fact.codes is not None])
    nodes, inputs, outputs, used = [], [], [], set()
    shaped = onnx.shape_inference.infer_shapes(proto).graph
    ranks = {v.name: [None] * len(v.type.tensor_type.shape.dim) for v in [*shaped.input, *shaped.value_info]}
    for i, fact in enumerate(layers):
        names = {fact.input: f"probe/{i}/input"}
        if fact.codes is not None:
            names[fact.codes] = f"probe/{i}/codes"
        names[fact.output] = f"probe/{i}/output"
        for node in _between(fact, makers, constants):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"probe/{i}/{node.name}"
            for part in (copy.input, copy.output):
                for k, name in enumerate(part):
                    part[k] = names.get(name, name if name in constants else f"probe/{i}/{name}")
            used |= {name for name in node.input if name in constants}
            nodes.append(copy)
        inputs.append(helper.make_tensor_value_info(f"probe/{i}/input", FLOAT, ranks.get(fact.input)))
        if fact.codes is not None:
            outputs.append(helper.make_tensor_value_info(f"probe/{i}/codes", types[fact.codes], None))
        outputs.append(helper.make_tensor_value_info(f"probe/{i}/output", FLOAT, None))
    kept = [tensor for name, tensor in constants.items() if name in used]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, kept)
    return helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version).SerializeToString()


def _between(fact: Facts, makers: dict[str, Any], constants: dict[str, Any]) -> list[Any]:
    """The nodes that lead from the layer's input to its output, in order of execution."""
    found: dict[int, Any] = {}

    def visit(name: str) -> None:
        if not name or name == fact.input or name in constants:
            return
        node = makers.get(name)
        if node is None:
            raise DamagedFile(f"the file's layer {fact.layer!r} is not connected from its input to its output")
        if id(node) in found:
            return
        for source in node.input:
            visit(source)
        found[id(node)] = node

    visit(fact.output)
    return list(found.values())


def _code_types(proto: Any, names: list[str]) -> dict[str, int]:
    """The element type of each value of codes: that of the zero point of the QuantizeLinear that makes it."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    constants = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    types = {}
    for name in names:
        node = makers.get(name)
        if node is not None and node.op_type == "Clip":
            node = makers.get(node.input[0])
        if node is None or node.op_type != "QuantizeLinear" or node.input[2] not in constants:
            raise DamagedFile(f"the file has no QuantizeLinear that makes {name!r}")
        types[name] = constants[node.input[2]]
    return types
