"""What the runtimes of ONNX files share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from lsquant.formats.onnx.row import OnnxFile
from lsquant.fusion import FusedNetwork
from lsquant.verification.runtimes.float_parts import says_float_parts
from lsquant.verification.runtimes.integer_runner import IntegerRunner
from lsquant.verification.runtimes.onnx_runner import OnnxRunner
from lsquant.verification.runtimes.onnx_session import Engine
from lsquant.verification.runtimes.protocol import Opened, Runtime


class OnnxRuntime(Runtime):
    """A runtime of ONNX files."""

    @abstractmethod
    def engine(self, recommended: dict[str, str], node_modules: Any) -> AbstractContextManager[Engine]:
        """Give what opens sessions, until the block ends.  recommended: the file's options for ONNX Runtime."""

    @contextmanager
    def open(self, path: str, content: OnnxFile, model: nn.Module, node_modules: Any = None) -> Iterator[Opened]:
        with self.engine(content.session, node_modules) as engine:
            fused = isinstance(model, FusedNetwork)
            kind: Any = IntegerRunner if fused else OnnxRunner
            runners = [(options, kind(engine, content, model, options)) for options in engine.kinds]
            remark = ""
            if isinstance(model, FusedNetwork) and engine.optimised is not None:
                graph = engine.optimised(path, engine.kinds[0])
                remark = says_float_parts(model, graph, engine.title)
            yield Opened(engine.title, [*runners], has_options=True, remarks=(remark,) if remark else ())
