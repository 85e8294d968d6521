"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lsquant._util.errors import UsageError
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
        yield Engine(f"ONNX Runtime {version} (CPU)", kinds, OrtSession)


class OrtSession:
    """A session of ONNX Runtime."""

    def __init__(self, source: str | bytes, options: dict[str, str]) -> None:
        self.session = make_session(source, options)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, names: Sequence[str], feeds: Arrays) -> list[np.ndarray]:
        try:
            return self.session.run(list(names), feeds)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in feeds.items())
            reason = next(iter(str(error).splitlines()), "")
            raise UsageError(f"ONNX Runtime cannot run the file on this batch ({shapes}): {reason}") from error
