"""The runtimes that ``verify`` runs ONNX files in: a name, and sessions that all look alike."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.optional import require
from lsquant.export.onnx import make_session
from lsquant.verification.web import Browser

Arrays = dict[str, np.ndarray]
RUNTIMES = ("onnxruntime", "openvino", "onnxruntime-web")


class Session(Protocol):
    """A loaded model: the names of its inputs and outputs, and a run."""

    inputs: list[str]
    outputs: list[str]

    def run(self, names: Sequence[str], feeds: Arrays) -> list[np.ndarray]:
        """The outputs of these names."""
        ...


@dataclass
class Runtime:
    """A runtime that is ready.

    title: with its version.  kinds: name of a configuration -> options; the first is the recommended one, "plain" has
    no options and is missing where it would be the same.  open: (path or bytes of a model, options) -> Session.
    """

    title: str
    kinds: dict[str, dict[str, str]]
    open: Callable[[str | bytes, dict[str, str]], Session]


class _Ort:
    def __init__(self, source: str | bytes, options: dict[str, str]) -> None:
        self.session = make_session(source, options)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, names: Sequence[str], feeds: Arrays) -> list[np.ndarray]:
        return self.session.run(list(names), feeds)


OPENVINO = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
"""Without these OpenVINO computes in bfloat16 where the processor can."""


class _OpenVino:
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
        found = self.model(feeds)
        return [np.array(found[self.ports[name]]) for name in names]


@contextmanager
def running(name: str, recommended: dict[str, str], node_modules: Any = None) -> Iterator[Runtime]:
    """The runtime of this name, one of RUNTIMES, until the block ends.

    recommended: the file's own options for ONNX Runtime.  node_modules: folder with onnxruntime-web, as for Browser.
    """
    if name == "openvino":
        version = require("openvino", extra="openvino").__version__.split("-")[0]
        yield Runtime(f"OpenVINO {version} (CPU)", {"recommended": OPENVINO, "plain": {}}, _OpenVino)
    elif name == "onnxruntime-web":
        with Browser(node_modules) as browser:
            yield Runtime(browser.title, {"plain": {}}, browser.open)
    else:
        version = require("onnxruntime", extra="onnx").__version__
        kinds = {"recommended": recommended, "plain": {}} if recommended else {"recommended": {}}
        yield Runtime(f"ONNX Runtime {version} (CPU)", kinds, _Ort)
