"""Reads ONNX files that ``export_onnx`` wrote, and opens sessions on them."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from lsquant._util.entry import Entry, parse_json, reason, shown
from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.files import require_file
from lsquant._util.optional import require
from lsquant.formats.onnx.graph import LayerTrace

FORMAT = 1
"""Version of the metadata; a reader refuses a higher one."""
PROFILES = ("exact", "qdq", "small", "integer")
SESSION_OPTIONS: dict[str, tuple[str, ...]] = {
    "session.x64quantprecision": ("0", "1"),
    "session.qdqisint8allowed": ("0", "1"),
}
"""The options that a file may recommend, each with its values.  None of them names a file or code."""
LAYOUTS = ("", "own", "reversed")
MOST_BYTES = 2**31
"""Of a file: protobuf takes no more."""


def load_onnx(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """Return (ModelProto, metadata) of a file that ``export_onnx`` wrote.

    metadata: profile, version, session (dict), layers (list of LayerTrace).

    Raises: MissingFile; DamagedFile for a truncated, damaged or foreign file, naming the key of the metadata that is
        wrong; UsageError for a newer format.
    """
    proto = _parsed(path)
    file = os.fspath(path)
    properties = _properties(proto, file)
    if "format" not in properties:
        raise DamagedFile(
            f"{path} has no lsquant metadata: lsquant.export_onnx did not write it, or its end is missing"
        )
    version = properties["format"]
    if not re.fullmatch("[0-9]{1,6}", version.text(), re.ASCII):
        raise version.wrong("a number")
    if int(version.value) > FORMAT:
        written = shown(properties["version"].value) if "version" in properties else "unknown"
        raise UsageError(f"{path} was written by lsquant {written}, a newer one; update lsquant")
    for name in ("profile", "version", "session", "layers"):
        if name not in properties:
            raise DamagedFile(f"{path} is damaged: its metadata lack lsquant.{name}")
    metadata = {
        "profile": properties["profile"].choice(PROFILES),
        "version": properties["version"].text(80),
        "session": _session(_json(properties["session"])),
        "layers": _layers(_json(properties["layers"])),
    }
    checker = require("onnx", extra="onnx").checker
    try:
        checker.check_model(proto)
    except (checker.ValidationError, ValueError, RuntimeError) as error:
        raise DamagedFile(f"{path} is damaged: {reason(error)}") from error
    _check_names(proto, metadata["layers"], file)
    return proto, metadata


def _parsed(path: str | os.PathLike[str]) -> Any:
    """Return the ModelProto of a file that keeps all its tensors in itself."""
    onnx = require("onnx", extra="onnx")
    require_file(path)
    if (size := os.path.getsize(path)) > MOST_BYTES:
        raise DamagedFile(f"{path} has {size:,} bytes, more than an ONNX file can have")
    try:
        proto = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:
        raise DamagedFile(f"{path} is not a readable ONNX file; it is damaged, truncated or of another kind") from error
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise DamagedFile(
                f"{path}: its tensor {shown(tensor.name)} lies in another file (external data); lsquant.export_onnx "
                "writes none, and nothing in a file may name a path"
            )
    return proto


def _tensors(message: Any) -> list[Any]:
    """Return all TensorProto in a message, at any depth (of graphs in attributes, of functions and so on)."""
    found, waiting = [], [message]
    while waiting:
        part = waiting.pop()
        if part.DESCRIPTOR.name == "TensorProto":
            found.append(part)
            continue
        for field, value in part.ListFields():
            if field.message_type is not None:
                waiting += [value] if hasattr(value, "DESCRIPTOR") else list(value)
    return found


def _properties(proto: Any, file: str) -> dict[str, Entry]:
    """Return the values of lsquant's metadata by key; a key twice, or text that is no UTF-8, is refused."""
    found: dict[str, Entry] = {}
    for pair in proto.metadata_props:
        try:
            key, value = str(pair.key), pair.value
        except ValueError as error:  # not UTF-8
            raise DamagedFile(f"{file} is damaged: its metadata are not UTF-8") from error
        if key.startswith("lsquant."):
            name = key.removeprefix("lsquant.")
            if name in found:
                raise DamagedFile(f"{file} is damaged: its metadata have {shown(key)} twice")
            found[name] = Entry(value, file, key[:80])
    return found


def _json(entry: Entry) -> Entry:
    return parse_json(entry.value if isinstance(entry.value, str) else "", entry.file, entry.key)


def _session(entry: Entry) -> dict[str, str]:
    """Return the recommended options.  Raises: DamagedFile for one that is not in SESSION_OPTIONS."""
    options: dict[str, str] = {}
    for name, value in entry.table().items():
        if name not in SESSION_OPTIONS:
            known = ", ".join(SESSION_OPTIONS)
            entry.refuse(f"the option {shown(name)} is none that a file may set; known are {known}")
        options[name] = value.choice(SESSION_OPTIONS[name])
    return options


def _layers(entry: Entry) -> list[LayerTrace]:
    return [_layer(item) for item in entry.items()]


def _layer(entry: Entry) -> LayerTrace:
    """Return a trace; its keys are those that ``LayerTrace.to_dict`` writes."""
    needed = ("layer", "call", "input", "output")
    names, lists, shifts = ("codes", "input_step"), ("weights", "scales", "weight_steps"), ("offset", "weight_offset")
    found = entry.record(needed, (*names, *lists, *shifts, "transposed", "layout"))
    values: dict[str, Any] = {name: found[name].text() for name in ("layer", "input", "output")}
    values["call"] = found["call"].integer(0, 2**31)
    values |= {name: found[name].text() for name in names if name in found and found[name].value is not None}
    values |= {name: found[name].texts() for name in lists if name in found}
    values |= {name: found[name].integer(-256, 256) for name in shifts if name in found}
    if "transposed" in found:
        values["transposed"] = found["transposed"].boolean()
    if "layout" in found:
        values["layout"] = found["layout"].choice(LAYOUTS)
    return LayerTrace.from_dict(values)


def _check_names(proto: Any, layers: list[LayerTrace], file: str) -> None:
    """Raise DamagedFile where a trace names a value or an initializer that the graph has not."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    values = {value.name for value in proto.graph.input} | {name for node in proto.graph.node for name in node.output}
    seen: set[tuple[str, int]] = set()
    for number, trace in enumerate(layers):
        entry = Entry(trace.layer, file, f"lsquant.layers[{number}]")
        if (trace.layer, trace.call) in seen:
            entry.refuse(f"call {trace.call} of the layer {shown(trace.layer)} is there twice")
        seen.add((trace.layer, trace.call))
        for name in (trace.input, trace.output, *([] if trace.codes is None else [trace.codes])):
            if name not in values and name not in constants:
                entry.refuse(f"the file has no value {shown(name)}, which its layer {shown(trace.layer)} names")
        steps = [] if trace.input_step is None else [trace.input_step]
        for name in (*trace.weights, *trace.scales, *trace.weight_steps, *steps):
            if name not in constants:
                entry.refuse(f"the file has no initializer {shown(name)}, which its layer {shown(trace.layer)} names")


def onnx_session(path: str | os.PathLike[str], **overrides: Any) -> Any:
    """Open an ``onnxruntime.InferenceSession`` on the CPU with the options that the file recommends.

    A file may recommend the options of ``SESSION_OPTIONS`` and no other.

    overrides: ``providers=[...]``; an attribute of SessionOptions (``intra_op_num_threads=1``); or, with a dot in its
        name, a configuration entry (``**{"session.x64quantprecision": "0"}``).

    Raises: MissingExtra, MissingFile, DamagedFile; UsageError for an unknown option or a value of another type.
    """
    _, metadata = load_onnx(path)
    return make_session(os.fspath(path), metadata["session"], **overrides)


def make_session(source: str | bytes, recommended: dict[str, str], **overrides: Any) -> Any:
    """Open a session on a file or on a serialized model.  Arguments and errors: as in ``onnx_session``.

    recommended: configuration entries, which are checked where they come from a file.
    """
    ort = require("onnxruntime", extra="onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what is an error is raised
    providers = overrides.pop("providers", ["CPUExecutionProvider"])
    for name, value in recommended.items():
        options.add_session_config_entry(name, value)
    known = [name for name in dir(type(options)) if isinstance(getattr(type(options), name), property)]
    for name, value in overrides.items():
        if "." in name:
            options.add_session_config_entry(name, str(value))
            continue
        if name not in known:
            raise UsageError(f"onnx_session: {name!r} is no attribute of onnxruntime.SessionOptions")
        try:
            setattr(options, name, value)
        except (TypeError, AttributeError) as error:
            said = f"{name}={shown(value)}"
            raise UsageError(f"onnx_session: {said} is not of the type that ONNX Runtime takes") from error
    try:
        return ort.InferenceSession(source, options, providers=providers)
    except Exception as error:
        where = source if isinstance(source, str) else "the model"
        raise DamagedFile(f"ONNX Runtime refuses {where}: {reason(error)}") from error


def initializers(proto: Any, file: str = "the file") -> dict[str, np.ndarray]:
    """Return the arrays of all initializers, by name.  Raises: DamagedFile for one whose data do not fit its shape."""
    numpy_helper = require("onnx", extra="onnx").numpy_helper
    found = {}
    for tensor in proto.graph.initializer:
        try:
            found[tensor.name] = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise DamagedFile(f"{file} is damaged: initializer {shown(tensor.name)}: {reason(error)}") from error
    return found
