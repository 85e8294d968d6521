"""An integer-only ONNX file in a runtime: as it is, and with all its stored tensors as outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from lsquant._util.batches import Forward
from lsquant._util.errors import UsageError
from lsquant._util.optional import require
from lsquant.formats.onnx.graph import INT8, UINT8, LayerTrace, array
from lsquant.formats.onnx.row import OnnxFile
from lsquant.fusion import FusedNetwork
from lsquant.program import gives_parts, whole
from lsquant.verification.recorder import Call, LayerCall
from lsquant.verification.runtimes.onnx_runner import feeds_of
from lsquant.verification.runtimes.onnx_session import Arrays, Engine
from lsquant.verification.runtimes.protocol import Observed


class StoredTensors:
    """What a runtime gives of a fused network: the codes of all stored tensors, and the outputs.

    The level ``layers`` compares the codes that a step makes where those that it reads are the trained ones.
    """

    def __init__(self, network: FusedNetwork) -> None:
        stored = network.program.stored
        self.reads = {
            step.end.name: [whole(source).name for source in step.node.inputs if stored[source] is not None]
            for step in network.program.steps
            if stored[step.end] is not None and not gives_parts(step.node)
        }

    def observed(self, call: Call, codes: dict[str, np.ndarray], outputs: list[tuple[str, np.ndarray]]) -> Observed:
        """Return what was observed for one call.  codes: by stored tensor, float32 whole numbers."""
        wanted = {name: array(recorded.output) for (name, _), recorded in call.layers.items()}
        equal = {name for name, found in codes.items() if np.array_equal(found, wanted.get(name, found))}
        layers: list[tuple[LayerCall, Any, Any]] = [
            ((name, 0), codes[name], codes[name]) for name in codes if equal.issuperset(self.reads[name])
        ]
        first = next((name for name in codes if name not in equal), "")
        end_to_end = [((name, 0), found) for name, found in codes.items()]
        return Observed(layers, end_to_end, outputs, partial(_explain, first))


class IntegerRunner:
    """Two sessions on one file: unmodified, and with the codes of all stored tensors as outputs."""

    def __init__(self, engine: Engine, file: OnnxFile, network: FusedNetwork, options: dict[str, str]) -> None:
        self.file = file
        self.traces = {trace.layer: trace for trace in file.traces if trace.codes is not None}
        if odd := sorted(set(self.traces) ^ set(network.taps)):
            raise UsageError(f"{file.path} is of another model: {odd[0]!r} is stored in one of the two only")
        self.stored = StoredTensors(network)
        self.whole = engine.open(file.path, options)
        self.outputs = [value.name for value in file.proto.graph.output]
        self.values = list(dict.fromkeys(str(trace.codes) for trace in self.traces.values()))
        self.shown = engine.open(_with_codes(file.proto, self.values), options)

    def run(self, calls: list[Call], batch: Any, forward: Forward | None) -> Iterator[Observed]:
        """Yield what the file gives for each call."""
        for call in calls:
            feeds = feeds_of(self.file.path, self.whole.inputs, call)
            codes = self._codes(feeds)
            outputs = self.whole.run(self.outputs, feeds)
            yield self.stored.observed(call, codes, list(zip(self.outputs, outputs, strict=True)))

    def _codes(self, feeds: Arrays) -> dict[str, np.ndarray]:
        got = dict(zip(self.values, self.shown.run(self.values, feeds), strict=True))
        return {name: _codes_of(got[str(trace.codes)], trace) for name, trace in self.traces.items()}


def _codes_of(stored: np.ndarray, trace: LayerTrace) -> np.ndarray:
    return stored.astype(np.float32) - np.float32(trace.stored_shift)


def _explain(first: str) -> str:
    if not first:
        return "all stored tensors are equal: what differs comes after the last of them"
    return f"the codes of {first!r} differ first: it is given equal values"


def _with_codes(proto: Any, names: list[str]) -> bytes:
    """Return the model with these codes as further outputs, serialized; limits are behind QuantizeLinear."""
    onnx = require("onnx", extra="onnx")
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    present = {value.name for value in model.graph.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    points = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2}
    kinds = {constants[name].data_type for name in points if name in constants}
    container = INT8 if kinds == {INT8} else UINT8
    extra = [onnx.helper.make_tensor_value_info(name, container, None) for name in names if name not in present]
    model.graph.output.extend(extra)
    if container == INT8:
        _move_limits(model.graph, constants)
    return model.SerializeToString()


def _move_limits(graph: Any, constants: dict[str, Any]) -> None:
    """Put an integer Clip behind QuantizeLinear in the place of a Relu or Clip before it, which gives the same codes.

    ONNX Runtime makes an integer operator of a layer only where QuantizeLinear follows at once.  Rounding is monotone:
    ``rint(clip(x, a, b) / s) = clip(rint(x / s), rint(a / s), rint(b / s))``.
    """
    onnx = require("onnx", extra="onnx")
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input) + Counter(v.name for v in graph.output)
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        limit = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" and len(node.input) == 3 else None
        if limit is None or limit.op_type not in ("Relu", "Clip") or readers[limit.output[0]] > 1:
            continue
        edges = [*limit.input[1:], "", ""][:2]
        if any(name not in constants for name in (*node.input[1:], *filter(None, edges))):
            continue
        held = {name: onnx.numpy_helper.to_array(constants[name]) for name in (*node.input[1:], *filter(None, edges))}
        if any(value.size != 1 or not np.isfinite(value).all() for value in held.values()):
            continue
        step, zero = (held[name].reshape(()) for name in node.input[1:])
        bounds = []
        for place, (edge, code) in enumerate(zip(edges, (-128, 127), strict=True)):
            if edge or (limit.op_type == "Relu" and place == 0):
                end = held[edge].reshape(()) if edge else np.float32(0)
                code = np.clip(np.rint(end / step) + int(zero), -128, 127)
            bounds.append(f"{node.output[0]}/bound_{place}")
            graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(code).astype(np.int8), bounds[-1]))
        codes, raw = node.output[0], f"{node.output[0]}/unlimited"
        node.input[0], node.output[0] = limit.input[0], raw
        nodes.remove(limit)
        nodes.append(onnx.helper.make_node("Clip", [raw, *bounds], [codes]))
    del graph.node[:]
    graph.node.extend(nodes)
