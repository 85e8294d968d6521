"""Reads ONNX files that ``export_onnx`` wrote, and opens sessions on them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lsquant._util.errors import DamagedFile, MissingFile, UsageError
from lsquant._util.optional import require
from lsquant.formats.onnx.graph import LayerTrace

FORMAT = 1
"""Version of the metadata; a reader refuses a higher one."""


def load_onnx(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """Return (ModelProto, metadata) of a file that ``export_onnx`` wrote.

    metadata: profile, version, session (dict), layers (list of LayerTrace).

    Raises: MissingFile; DamagedFile for a truncated, damaged or foreign file; UsageError for a newer format.
    """
    onnx = require("onnx", extra="onnx")
    if not Path(path).is_file():
        raise MissingFile(f"{path} does not exist")
    try:
        proto = onnx.load(os.fspath(path))
        pairs = {str(p.key): str(p.value) for p in proto.metadata_props if isinstance(p.key + p.value, str)}  # or bytes
    except Exception as error:
        raise DamagedFile(f"{path} is not a readable ONNX file; it is damaged, truncated or of another kind") from error
    properties = {key.removeprefix("lsquant."): value for key, value in pairs.items() if key.startswith("lsquant.")}
    if "format" not in properties:
        raise DamagedFile(
            f"{path} has no lsquant metadata: lsquant.export_onnx did not write it, or its end is missing"
        )
    if int(properties["format"]) > FORMAT:
        raise UsageError(f"{path} was written by lsquant {properties.get('version')}, a newer one; update lsquant")
    try:
        layers = [LayerTrace.from_dict(entry) for entry in json.loads(properties["layers"])]
        metadata = {
            "profile": properties["profile"],
            "version": properties["version"],
            "session": json.loads(properties["session"]),
            "layers": layers,
        }
        onnx.checker.check_model(proto)
    except Exception as error:
        raise DamagedFile(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    return proto, metadata


def onnx_session(path: str | os.PathLike[str], **overrides: Any) -> Any:
    """Open an ``onnxruntime.InferenceSession`` on the CPU with the options that the file recommends.

    overrides: ``providers=[...]``; an attribute of SessionOptions (``intra_op_num_threads=1``); or, with a dot in its
        name, a configuration entry (``**{"session.x64quantprecision": "0"}``).

    Raises: MissingExtra, MissingFile, DamagedFile; UsageError for an unknown option.
    """
    _, metadata = load_onnx(path)
    return make_session(os.fspath(path), metadata["session"], **overrides)


def make_session(source: str | bytes, recommended: dict[str, str], **overrides: Any) -> Any:
    """Open a session on a file or on a serialized model.  Arguments and errors: as in ``onnx_session``."""
    ort = require("onnxruntime", extra="onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    providers = overrides.pop("providers", ["CPUExecutionProvider"])
    for name, value in {**recommended, **overrides}.items():
        if "." in name:
            options.add_session_config_entry(name, str(value))
        elif hasattr(options, name):
            setattr(options, name, value)
        else:
            raise UsageError(f"onnx_session: {name!r} is no attribute of onnxruntime.SessionOptions")
    try:
        return ort.InferenceSession(source, options, providers=providers)
    except Exception as error:
        where = source if isinstance(source, str) else "the model"
        raise DamagedFile(f"ONNX Runtime refuses {where}: {str(error).splitlines()[0]}") from error


def initializers(proto: Any) -> dict[str, np.ndarray]:
    """Return the arrays of all initializers, by name."""
    numpy_helper = require("onnx", extra="onnx").numpy_helper
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
