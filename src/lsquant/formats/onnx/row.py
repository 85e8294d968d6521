"""The rows of ONNX files in the table of formats, one a profile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lsquant._util.errors import DamagedFile, UsageError
from lsquant.formats.base import FileFormat
from lsquant.formats.onnx.graph import LayerTrace, array
from lsquant.formats.onnx.reader import initializers, load_onnx
from lsquant.formats.onnx.writer import export_onnx
from lsquant.shipped import Pair, Shipped, ShippedQuantizer


@dataclass(frozen=True)
class OnnxFile:
    """The content of an ONNX file.

    path: of the file.
    proto: its ModelProto.
    profile: with which it was written.
    session: the options that it recommends for ONNX Runtime.
    traces: of its layers, in order of execution.
    """

    path: str
    proto: Any
    profile: str
    session: dict[str, str]
    traces: list[LayerTrace]


class OnnxFormat(FileFormat):
    """ONNX files of one profile of ``export_onnx``."""

    suffix = ".onnx"
    options = ("opset",)
    runtimes = ("onnxruntime", "openvino", "onnxruntime-web")

    def __init__(self, name: str, about: str, promise: str) -> None:
        self.name, self.about, self.promise = name, about, promise

    def write(self, model: nn.Module, path: Path, example_inputs: Any, **options: Any) -> Path:
        self.require_options(options)
        return export_onnx(model, path, example_inputs, profile=self.name, **options)

    def recognizes(self, path: Path) -> bool:
        """Tell whether a file begins as an ONNX model does: with the field of its version.

        A safetensors file, which has JSON from its ninth byte on, may begin with the same byte.
        """
        with open(path, "rb") as file:
            start = file.read(9)
        return start[:1] == b"\x08" and start[8:] != b"{"

    def read(self, path: str | os.PathLike[str]) -> OnnxFile:
        proto, metadata = load_onnx(path)
        return OnnxFile(os.fspath(path), proto, metadata["profile"], metadata["session"], metadata["layers"])

    def profile(self, content: OnnxFile) -> str:
        return content.profile

    def weights(self, content: OnnxFile, record: Shipped) -> Iterator[Pair]:
        """Yield codes, steps and products of steps of each call of a layer.

        Layers of the model that the file lacks, because its graph never calls them, are passed over.
        """
        names = {trace.layer for trace in content.traces}
        if odd := sorted(names - {*record.layers, *record.standalone()}):
            raise UsageError(f"{content.path} is of another model: only the file has a layer {odd[0]!r}")
        values = initializers(content.proto, content.path)
        for trace in content.traces:
            _check_types(trace, values, content.path)
            try:
                pairs = list(_pairs(trace, record, values))
            except ValueError as error:  # shapes that cannot be joined
                raise DamagedFile(f"{content.path} is damaged: layer {trace.layer!r}: {error}") from error
            yield from pairs


def _check_types(trace: LayerTrace, values: dict[str, np.ndarray], file: str) -> None:
    """Raise DamagedFile where codes are no integers, or steps no floats."""
    steps = [*trace.scales, *([trace.input_step] if trace.input_step else [])]
    odd = [name for name in trace.weights if not _holds_integers(values[name])]
    odd += [name for name in steps if values[name].dtype != np.float32]
    odd += [name for name in trace.weight_steps if values[name].dtype not in (np.float32, np.float16)]
    if odd:
        kind = values[odd[0]].dtype
        raise DamagedFile(f"{file} is damaged: layer {trace.layer!r}: initializer {odd[0]!r} is of type {kind}")
    if (trace.scales or trace.weight_steps) and not trace.weights:
        raise DamagedFile(f"{file} is damaged: layer {trace.layer!r} has steps of a weight, and no weights")


def _holds_integers(values: np.ndarray) -> bool:
    return values.dtype.kind in "iu" or values.dtype.name in ("int2", "uint2", "int4", "uint4")


def _pairs(trace: LayerTrace, record: Shipped, values: dict[str, np.ndarray]) -> Iterator[Pair]:
    """Yield what the initializers hold of one call of a layer, or of a quantizer that stands alone."""
    layer = record.layers.get(trace.layer)
    source = record.quantizers[trace.layer] if layer is None else layer.input
    if source is not None and trace.input_step:
        yield Pair(trace.layer, values[trace.input_step].reshape(-1), source.step)
    if layer is None or layer.weight is None:
        return
    yield _codes(trace, layer.weight, values)
    if trace.weight_steps:
        steps = values[trace.weight_steps[0]].astype(np.float32)  # those that are float16 numbers may be stored so
        yield Pair(trace.layer, steps.reshape(-1), layer.weight.step)
    if trace.scales:
        assert source is not None
        scales = np.stack([values[name].reshape(-1) for name in trace.scales], axis=1)
        yield Pair(trace.layer, scales.reshape(-1), (source.step * layer.weight.step).reshape(-1))


def _codes(trace: LayerTrace, quantizer: ShippedQuantizer, values: dict[str, np.ndarray]) -> Pair:
    """Return the codes of a weight, without their shift and as int32, beside the shipped ones."""
    weight = quantizer.weight
    assert weight is not None
    if not trace.weights:
        return Pair(trace.layer, None, weight.codes)
    wanted = array(weight.own_codes() if trace.layout == "own" else weight.codes).astype(np.int32)
    parts = [values[name].astype(np.int32) for name in trace.weights]
    if trace.transposed:
        parts = [part.T for part in parts]
    stored = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    if stored.size == wanted.size and not trace.transposed:
        stored = stored.reshape(wanted.shape)
    if trace.layout == "reversed":
        stored = np.flip(stored, tuple(range(2, stored.ndim)))
    return Pair(trace.layer, stored - trace.weight_shift, wanted)
