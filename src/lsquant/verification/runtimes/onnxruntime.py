"""ONNX Runtime, on the CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lsquant._util.entry import reason
from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.optional import require
from lsquant.formats.onnx.reader import make_session
from lsquant.verification.runtimes.onnx_runtime import OnnxRuntime
from lsquant.verification.runtimes.onnx_session import Arrays, Engine


class OrtRuntime(OnnxRuntime):
    """The runtime whose options a file recommends."""

    name = "onnxruntime"

    @contextmanager
    def engine(self, recommended: dict[str, str], node_modules: Any) -> Iterator[Engine]:
        version = require("onnxruntime", extra="onnx").__version__
        kinds = [recommended, {}] if recommended else [{}]
        yield Engine(f"ONNX Runtime {version} (CPU)", kinds, OrtSession, optimised)


def optimised(path: str, options: dict[str, str]) -> Any:
    """Return the graph that ONNX Runtime makes of a file before it runs it."""
    with tempfile.TemporaryDirectory() as folder:
        written = os.path.join(folder, "optimised.onnx")
        make_session(path, options, optimized_model_filepath=written)
        return require("onnx", extra="onnx").load(written).graph


class OrtSession:
    """A session of ONNX Runtime."""

    def __init__(self, source: str | bytes, options: dict[str, str]) -> None:
        self.where = source if isinstance(source, str) else "the model"
        self.session = make_session(source, options)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, names: Sequence[str], feeds: Arrays) -> list[np.ndarray]:
        try:
            found = self.session.run(list(names), feeds)
        except Exception as error:  # its own kinds, which derive from Exception
            shapes = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in feeds.items())
            why = f"ONNX Runtime cannot run {self.where} on this batch ({shapes}): {reason(error)}"
            raise UsageError(why) from error
        if any(not isinstance(value, np.ndarray) for value in found):
            raise DamagedFile(f"{self.where} has an output that is no tensor")
        return found
