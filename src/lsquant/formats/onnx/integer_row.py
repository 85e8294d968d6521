"""The row of integer-only ONNX files in the table of formats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from lsquant._util.errors import UsageError
from lsquant.formats.onnx.graph import array
from lsquant.formats.onnx.reader import initializers
from lsquant.formats.onnx.row import OnnxFile, OnnxFormat
from lsquant.formats.subpixel import as_written
from lsquant.fusion import FusedNetwork, fuse
from lsquant.fusion.arithmetic import Folded
from lsquant.shipped import Pair


def _biases(held: np.ndarray, folded: Folded, read_step: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return a file's bias and the folded one: integers, or float32 as files of target "tensorrt" have it."""
    if held.dtype == np.float32:
        return held, array(folded.bias.float() * (read_step * folded.step))
    return held.astype(np.int64), array(folded.bias).astype(np.int64)


class IntegerOnnxFormat(OnnxFormat):
    """ONNX files of profile integer, which are compared with the fused network."""

    options = ("opset", "form")

    def counterpart(self, model: nn.Module) -> nn.Module:
        return model if isinstance(model, FusedNetwork) else fuse(model)

    def pairs(self, content: OnnxFile, counterpart: Any) -> Iterator[Pair]:
        """Yield the step of every stored tensor, and of every layer codes, folded steps and bias."""
        network: FusedNetwork = counterpart
        constants, steps = network.constants(), network.stored_steps()
        values = initializers(content.proto, content.path)
        for trace in content.traces:
            if trace.codes is not None and trace.input_step is not None:
                if trace.layer not in steps:
                    raise UsageError(f"{content.path} is of another model: only the file has {trace.layer!r}")
                yield Pair(trace.layer, values[trace.input_step].reshape(-1), array(steps[trace.layer].reshape(-1)))
            if not trace.weights:
                continue
            name = trace.weights[0].removesuffix(".weight")
            bias = next((key for key in (f"{name}.bias", f"{name}.shaped_bias") if key in values), None)
            if name not in constants or bias is None:
                raise UsageError(f"{content.path} is of another model: only the file has a layer {name!r}")
            folded = as_written(network.layer(name), constants[name], name, "export_onnx")
            held, codes = values[trace.weights[0]].astype(np.int32), array(folded.codes).astype(np.int32)
            if held.ndim == 2 and codes.shape[:2] == held.shape and codes.size == held.size:  # written as a matrix
                codes = codes.reshape(held.shape)
            yield Pair(name, held, codes)
            yield Pair(name, *_biases(values[bias].reshape(-1), folded, network.read_step(name)))
            for key in trace.weight_steps:
                yield Pair(name, values[key].reshape(-1), array(folded.step))
            for key in trace.scales:
                yield Pair(name, values[key].reshape(-1), array(folded.step * network.read_step(name)))
