"""An ONNX file in a runtime: as it is, with its codes as outputs, and cut into its layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from lsquant._util.batches import Forward
from lsquant._util.errors import UsageError
from lsquant.formats.onnx.graph import array
from lsquant.formats.onnx.row import OnnxFile
from lsquant.verification.recorder import Call, LayerCall, layer_input, watched
from lsquant.verification.runtimes.onnx_probes import ROUNDED_ONCE, float_nodes, layers_alone, ranks_of, with_outputs
from lsquant.verification.runtimes.onnx_session import Arrays, Engine
from lsquant.verification.runtimes.protocol import Observed
from lsquant.verification.verdict import different


class OnnxRunner:
    """Three sessions on one file: unmodified, with all codes as outputs, and the layers alone.

    engine: opens the sessions.
    file: the content of the file.
    model: the trained model.
    options: of the sessions.
    """

    def __init__(self, engine: Engine, file: OnnxFile, model: nn.Module, options: dict[str, str]) -> None:
        self.file, self.traces, self.modules = file, file.traces, watched(model)
        self.engine, self.options = engine, options
        self.whole = engine.open(file.path, options)
        self.outputs = [value.name for value in file.proto.graph.output]
        self.codes = list(dict.fromkeys(trace.codes for trace in self.traces if trace.codes is not None))
        self.shown = engine.open(with_outputs(file.proto, self.codes), options)
        self.alone = engine.open(layers_alone(file.proto, self.traces), options)
        self.ranks = ranks_of(file.proto)

    def run(self, calls: list[Call], batch: Any, forward: Forward | None) -> Iterator[Observed]:
        """Yield what the file gives for each call.  Raises: UsageError where it was made from another model."""
        for call in calls:
            layers = self._layers(call)
            feeds = feeds_of(self.file.path, self.whole.inputs, call)
            codes = self._codes(call, feeds)
            outputs = self.whole.run(self.outputs, feeds)
            explain = partial(self._first_difference, call, feeds)
            yield Observed(layers, codes, list(zip(self.outputs, outputs, strict=True)), explain)

    def _layers(self, call: Call) -> list[tuple[LayerCall, np.ndarray | None, np.ndarray]]:
        feeds, wanted, unbatched = {}, [], set()
        for i, trace in enumerate(self.traces):
            key = (trace.layer, trace.call)
            if key not in call.layers:
                path, layer = self.file.path, trace.layer
                raise UsageError(f"{path}: the model called layer {layer!r} less often than the exported one does")
            given = layer_input(self.modules[trace.layer], call.layers[key].input)
            x = array(given).reshape(given.shape)  # one index is no array of one
            if self.ranks.get(trace.input) == x.ndim + 1:  # a sample without a batch dimension: the file adds it
                unbatched.add(i)
                x = x[None]
            feeds[f"probe/{i}/input"] = x
            wanted += [f"probe/{i}/output"] if trace.codes is None else [f"probe/{i}/codes", f"probe/{i}/output"]
        got = dict(zip(wanted, self.alone.run(wanted, feeds), strict=True))
        found = []
        for i, trace in enumerate(self.traces):
            codes = got.get(f"probe/{i}/codes")
            codes = None if codes is None else _trained_codes(codes, trace.stored_shift)
            output = got[f"probe/{i}/output"]
            recorded = call.layers[trace.layer, trace.call]
            if i in unbatched:
                codes = None if codes is None else _sample(codes, recorded.input.ndim)
                output = _sample(output, recorded.output.ndim)
            found.append(((trace.layer, trace.call), codes, output))
        return found

    def _codes(self, call: Call, feeds: Arrays) -> list[tuple[LayerCall, np.ndarray | None]]:
        got = dict(zip(self.codes, self.shown.run(self.codes, feeds), strict=True)) if self.codes else {}
        found: list[tuple[LayerCall, np.ndarray | None]] = []
        for trace in self.traces:
            codes = None
            if trace.codes is not None:
                codes = _trained_codes(got[trace.codes], trace.stored_shift)
                codes = _sample(codes, call.layers[trace.layer, trace.call].input.ndim)
            found.append(((trace.layer, trace.call), codes))
        return found

    def _first_difference(self, call: Call, feeds: Arrays) -> str:
        """Name what first gives another value than the trained model, from the inputs on: a float part or a layer."""
        graph = self.file.proto.graph
        ends = {value.name for value in [*graph.input, *graph.initializer]}
        wanted = [name for trace in self.traces for name in (trace.input, trace.output) if name not in ends]
        wanted = list(dict.fromkeys([*wanted, *self.outputs]))
        session = self.engine.open(with_outputs(self.file.proto, wanted, floats=True), self.options)
        got = dict(zip(wanted, session.run(wanted, feeds), strict=True))

        def differs(name: str, want: Tensor) -> bool:
            if name not in got:  # an input of the model
                return False
            value = _sample(got[name], want.ndim)
            return value.shape != tuple(want.shape) or bool(different(value, array(want)).any())

        before = ""
        for trace in self.traces:
            recorded = call.layers[trace.layer, trace.call]
            if differs(trace.input, layer_input(self.modules[trace.layer], recorded.input)):
                return self._float_parts(trace.input, f"before layer {trace.layer!r}")
            if differs(trace.output, recorded.output):
                return f"layer {trace.layer!r} differs first: it is given equal values"
            before = trace.layer
        for name, want in zip(self.outputs, call.outputs, strict=True):
            if differs(name, want):
                return self._float_parts(name, f"after layer {before!r}")
        return "with inner values as outputs the runtime gives equal values, so it computes fused operators otherwise"

    def _float_parts(self, value: str, where: str) -> str:
        """Name the operators that lead from layers and inputs to a value: those that runtimes round differently."""
        ends = {trace.output for trace in self.traces}
        nodes = float_nodes(self.file.proto, value, ends)
        suspects = [node for node in nodes if node.op_type not in ROUNDED_ONCE] or nodes
        named = [f"{node.op_type} ({node.name})" for node in suspects[:3]]
        more = f" and {len(suspects) - 3} more" if len(suspects) > 3 else ""
        return f"float parts that differ first: {', '.join(named)}{more}, {where}"


def feeds_of(path: str, inputs: list[str], call: Call) -> Arrays:
    """Return what a file is given: the tensors of its inputs' names, the others in order.

    Raises: UsageError where it has not as many inputs as the model was given tensors.
    """
    given = [*zip(call.names, call.inputs, strict=True), *call.keywords.items()]
    if len(inputs) != len(given):
        raise UsageError(f"{path} takes the inputs {inputs}; the model was given {len(given)} tensors")
    named = {name.lower(): tensor for name, tensor in given}  # torch's exporter writes lower case
    if len(named) == len(given) and all(name.lower() in named for name in inputs):
        return {name: array(named[name.lower()]) for name in inputs}
    keywords = {name.lower(): t for name, t in call.keywords.items()}
    feeds = {name: array(keywords[name.lower()]) for name in inputs if name.lower() in keywords}
    left = [name for name in inputs if name not in feeds]
    rest = [*call.inputs, *(t for name, t in call.keywords.items() if name.lower() not in map(str.lower, feeds))]
    return {**feeds, **dict(zip(left, map(array, rest), strict=True))}


def _sample(values: np.ndarray, dims: int) -> np.ndarray:
    """Return values with this many dimensions: without the batch of one sample, if they have it."""
    return values[0] if values.ndim == dims + 1 and len(values) == 1 else values


def _trained_codes(stored: np.ndarray, shift: int) -> np.ndarray:
    """Return codes as they were trained, float32 integers, from those of the file."""
    return stored.astype(np.float32) - np.float32(shift)
