"""An ONNX file in a runtime: as it is, with its codes as outputs, and cut into its layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from lsquant._util.batches import Forward
from lsquant._util.errors import UsageError
from lsquant.formats.onnx.graph import array
from lsquant.formats.onnx.row import OnnxFile
from lsquant.verification.recorder import Call, LayerCall, layer_input, watched
from lsquant.verification.runtimes.onnx_probes import layers_alone, with_outputs
from lsquant.verification.runtimes.onnx_session import Arrays, Engine
from lsquant.verification.runtimes.protocol import Observed


class OnnxRunner:
    """Three sessions on one file: unmodified, with all codes as outputs, and the layers alone.

    engine: opens the sessions.
    file: the content of the file.
    model: the trained model.
    options: of the sessions.
    """

    def __init__(self, engine: Engine, file: OnnxFile, model: nn.Module, options: dict[str, str]) -> None:
        self.file, self.traces, self.modules = file, file.traces, watched(model)
        self.whole = engine.open(file.path, options)
        self.outputs = [value.name for value in file.proto.graph.output]
        self.codes = list(dict.fromkeys(trace.codes for trace in self.traces if trace.codes is not None))
        self.shown = engine.open(with_outputs(file.proto, self.codes), options)
        self.alone = engine.open(layers_alone(file.proto, self.traces), options)

    def run(self, calls: list[Call], batch: Any, forward: Forward | None) -> Iterator[Observed]:
        """Yield what the file gives for each call.  Raises: UsageError where it was made from another model."""
        for call in calls:
            layers = self._layers(call)
            feeds = self._feeds(call)
            codes = self._codes(feeds)
            outputs = self.whole.run(self.outputs, feeds)
            yield Observed(layers, codes, list(zip(self.outputs, outputs, strict=True)))

    def _layers(self, call: Call) -> list[tuple[LayerCall, np.ndarray | None, np.ndarray]]:
        feeds, wanted = {}, []
        for i, trace in enumerate(self.traces):
            key = (trace.layer, trace.call)
            if key not in call.layers:
                path, layer = self.file.path, trace.layer
                raise UsageError(f"{path}: the model called layer {layer!r} less often than the exported one does")
            feeds[f"probe/{i}/input"] = array(layer_input(self.modules[trace.layer], call.layers[key].input))
            wanted += [f"probe/{i}/output"] if trace.codes is None else [f"probe/{i}/codes", f"probe/{i}/output"]
        got = dict(zip(wanted, self.alone.run(wanted, feeds), strict=True))
        found = []
        for i, trace in enumerate(self.traces):
            codes = got.get(f"probe/{i}/codes")
            codes = None if codes is None else _trained_codes(codes, trace.stored_shift)
            found.append(((trace.layer, trace.call), codes, got[f"probe/{i}/output"]))
        return found

    def _codes(self, feeds: Arrays) -> list[tuple[LayerCall, np.ndarray | None]]:
        got = dict(zip(self.codes, self.shown.run(self.codes, feeds), strict=True)) if self.codes else {}
        found: list[tuple[LayerCall, np.ndarray | None]] = []
        for trace in self.traces:
            codes = None if trace.codes is None else _trained_codes(got[trace.codes], trace.stored_shift)
            found.append(((trace.layer, trace.call), codes))
        return found

    def _feeds(self, call: Call) -> Arrays:
        keywords = {name.lower(): t for name, t in call.keywords.items()}  # torch's exporter writes lower case
        inputs = self.whole.inputs
        feeds = {name: array(keywords[name.lower()]) for name in inputs if name.lower() in keywords}
        names = [name for name in inputs if name not in feeds]
        if len(names) != len(call.inputs):
            given = len(call.inputs)
            raise UsageError(f"{self.file.path} takes the inputs {inputs}; the model was given {given} tensors")
        return {**feeds, **dict(zip(names, map(array, call.inputs), strict=True))}


def _trained_codes(stored: np.ndarray, shift: int) -> np.ndarray:
    """Return codes as they were trained, float32 integers, from those of the file."""
    return stored.astype(np.float32) - np.float32(shift)
