"""NumPy: the program of an integer-only network, run by the reader of 100 lines that ships beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from lsquant._util.batches import Forward
from lsquant.formats.onnx.graph import array
from lsquant.formats.program import reader
from lsquant.formats.program.row import ProgramFile
from lsquant.formats.program.writer import program_inputs
from lsquant.fusion import FusedNetwork
from lsquant.verification.recorder import Call
from lsquant.verification.runtimes.integer_runner import StoredTensors
from lsquant.verification.runtimes.onnx_runner import feeds_of
from lsquant.verification.runtimes.protocol import Observed, Opened, Runtime


class NumpyRuntime(Runtime):
    """Runs programs."""

    name = "numpy"

    @contextmanager
    def open(self, path: str, content: ProgramFile, model: nn.Module, node_modules: Any = None) -> Iterator[Opened]:
        assert isinstance(model, FusedNetwork)
        yield Opened(f"NumPy {np.__version__}", [({}, ProgramRunner(content, model))], has_options=False)


class ProgramRunner:
    """A program, whose steps and tensors have been compared with the network's."""

    def __init__(self, file: ProgramFile, network: FusedNetwork) -> None:
        self.file, self.stored = file, StoredTensors(network)
        self.inputs = [str(node.call.target) for node in program_inputs(network)]
        self.tensors = {name: array(tensor) for name, tensor in file.tensors.items()}

    def run(self, calls: list[Call], batch: Any, forward: Forward | None) -> Iterator[Observed]:
        """Yield what the program gives for each call."""
        for call in calls:
            given = {**dict(zip(call.names, call.inputs, strict=True)), **call.keywords}
            named = all(name in given for name in self.inputs)
            feeds = {n: array(given[n]) for n in self.inputs} if named else feeds_of(self.file.path, self.inputs, call)
            with np.errstate(all="ignore"):  # steps of a damaged file
                outputs, codes = reader.run(self.file.document, self.tensors, *(feeds[name] for name in self.inputs))
            found = {name: codes[name].astype(np.float32) for name in self.stored.reads}
            yield self.stored.observed(call, found, [(f"output {i}", y) for i, y in enumerate(outputs)])
