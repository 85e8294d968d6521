"""OpenVINO, on the CPU."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.optional import require
from lsquant.verification.runtimes.onnx_runtime import OnnxRuntime
from lsquant.verification.runtimes.onnx_session import Arrays, Engine

OPENVINO = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
"""The recommended options.  Without them OpenVINO computes in bfloat16 where the processor can."""


class OpenVinoRuntime(OnnxRuntime):
    """OpenVINO in float32 and with accuracy before speed, and as it is by default."""

    name = "openvino"

    @contextmanager
    def engine(self, recommended: dict[str, str], node_modules: Any) -> Iterator[Engine]:
        version = require("openvino", extra="openvino").__version__.split("-")[0]
        yield Engine(f"OpenVINO {version} (CPU)", [OPENVINO, {}], OpenVinoSession)


class OpenVinoSession:
    """A compiled model.  Raises: UsageError for a type that OpenVINO lacks; DamagedFile where it refuses the model."""

    def __init__(self, source: str | bytes, options: dict[str, str]) -> None:
        openvino = require("openvino", extra="openvino")
        try:
            core = openvino.Core()
            model = core.read_model(source if isinstance(source, str) else io.BytesIO(source))
            self.model = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            where = source if isinstance(source, str) else "the model"
            reason = str(error).strip().splitlines()[-1].strip()
            if "Unsupported type" in reason:
                raise UsageError(f"OpenVINO refuses {where}: {reason}; 2-bit codes: export with opset=21") from error
            raise DamagedFile(f"OpenVINO refuses {where}: {reason[-300:]}") from error
        self.ports = {name: port for port in self.model.outputs for name in port.get_names()}
        self.inputs = [port.get_any_name() for port in self.model.inputs]
        self.outputs = list(self.ports)

    def run(self, names: Sequence[str], feeds: Arrays) -> list[np.ndarray]:
        try:
            found = self.model(feeds)
        except RuntimeError as error:
            raise DamagedFile(f"OpenVINO cannot run the model: {str(error).strip()[-300:]}") from error
        if missing := [name for name in names if name not in self.ports]:
            raise DamagedFile(f"the model has no output {missing[0]!r} in OpenVINO")
        return [np.array(found[self.ports[name]]) for name in names]
