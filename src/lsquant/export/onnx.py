"""ONNX files whose integers are the trained ones, and the session that runs them as intended."""

from __future__ import annotations

import ast
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lsquant._util.batches import evaluating
from lsquant._util.errors import DamagedFile, MissingFile, UsageError
from lsquant._util.files import atomic_write_bytes
from lsquant._util.optional import require
from lsquant._version import __version__
from lsquant.export.capture import TORCH_OPSET, captured
from lsquant.export.graph import Facts, Graph
from lsquant.export.lowering import NARROW, lower, narrow_type
from lsquant.integer import IntegerLayer, integer_model

FORMAT = 1
"""Version of the metadata; a reader refuses a higher one."""

LOWEST_OPSET = 13  # QuantizeLinear and DequantizeLinear with an axis
PROFILES = {"exact": True, "qdq": True, "small": True, "fast": False}  # name -> built
SESSION: dict[str, dict[str, str]] = {"exact": {}, "small": {}, "qdq": {"session.x64quantprecision": "1"}}
"""Recommended session configuration entries of each profile (see docs/deployment.md for the measurements)."""


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    profile: str = "exact",
    opset: int | None = None,
) -> Path:
    """Write ``model`` in eval mode as an ONNX file with a dynamic batch dimension; the model is unchanged.

    example_inputs: one batch as for ``calibrate``: a tensor; a tuple or list, whose first element counts; a mapping of
    keywords for a model with several inputs.  The first dimension of each tensor is the batch.
    profile: "exact", integer sums equal to the trained layers; "small", the same with weights of 2 bits as INT2 or
    UINT2 and of 3 and 4 bits as INT4 or UINT4 (opset 25 and 21; with opset=21 all of 4 bits); or "qdq", standard
    QuantizeLinear and DequantizeLinear around float operators.  opset: the file's operator set; default: the lowest one
    that has all the operators and types used.
    The file is written aside and renamed.  Returns the path.

    Raises: UsageError for an unknown profile, an unset step (naming the layer), a model without quantized layers, an
    opset that is too low (naming the operator); MissingExtra without onnx.
    """
    proto = onnx_model(model, example_inputs, profile=profile, opset=opset)
    atomic_write_bytes(path, proto.SerializeToString(deterministic=True))
    return Path(path)


def onnx_model(
    model: nn.Module,
    example_inputs: Any,
    *,
    profile: str = "exact",
    opset: int | None = None,
    dynamic_batch: bool = True,
) -> Any:
    """The ModelProto that ``export_onnx`` writes.  dynamic_batch=False: of the example's batch size."""
    if not PROFILES.get(profile, False):
        built = ", ".join(repr(name) for name, ready in PROFILES.items() if ready)
        state = "is not built yet" if profile in PROFILES else "is unknown"
        raise UsageError(f"export_onnx: profile={profile!r} {state}; choose from {built}")
    onnx = require("onnx", extra="onnx")
    require("onnxscript", extra="onnx")
    with evaluating(model):
        frozen = integer_model(model)
    opset = _small_opset(frozen, opset) if profile == "small" else opset
    proto, layers = captured(frozen, example_inputs, opset or TORCH_OPSET, dynamic_batch)
    facts = _replace_marked(proto.graph, layers, profile, opset or TORCH_OPSET)
    _tidy(proto, facts)
    _set_opset(proto, opset)
    _write_metadata(proto, profile, facts)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _small_opset(frozen: nn.Module, wanted: int | None) -> int | None:
    """The operator set of a file of profile small: the lowest that has the types which its weights fit in."""
    bounds = {m.weight_bounds for m in frozen.modules() if isinstance(m, IntegerLayer)}
    types = {str(narrow_type(*pair, NARROW[0][1])) for pair in bounds}
    best = next((since for bits, since in NARROW if any(name.endswith(f"int{bits}'>") for name in types)), None)
    lowest = NARROW[-1][1]
    if wanted is not None and best is not None and wanted < lowest:
        raise UsageError(f"export_onnx: opset={wanted} has no 4-bit type; profile='small' needs opset={lowest} or more")
    return wanted or best


def _replace_marked(graph: Any, layers: dict[str, nn.Module], profile: str, opset: int) -> list[Facts]:
    """Lower every marked node in place; the order of the nodes, and of the facts, is that of execution."""
    numpy_helper = require("onnx", extra="onnx").numpy_helper
    shapes = {
        v.name: [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim]
        for v in [*graph.input, *graph.value_info, *graph.output]
    }
    target, facts, calls = Graph(), [], {}
    renamed: dict[str, str] = {}
    for node in graph.node:
        sources = list(node.input)
        for i, name in enumerate(sources):
            node.input[i] = renamed.get(name, name)
        if node.domain != "lsquant":
            target.nodes.append(node)
            continue
        layer = next(a.s.decode() for a in node.attribute if a.name == "layer")
        call = calls[layer] = calls.get(layer, -1) + 1
        output = f"{layer or 'model'}{f'#{call + 1}' if call else ''}/output"
        renamed[node.output[0]] = output
        fact = Facts(layer, call, node.input[0], output)
        lower(target, layers[layer], fact, (shapes[sources[0]], shapes[node.output[0]]), profile, opset)
        facts.append(fact)
    for value in graph.output:
        value.name = renamed.get(value.name, value.name)
    old = {tensor.name: tensor for tensor in graph.initializer}
    if clash := sorted(set(old) & set(target.constants)):
        raise UsageError(f"export_onnx: the model already has a parameter or buffer named {clash[0]!r}; rename it")
    used = {name for node in target.nodes for name in node.input}
    used |= {value.name for value in graph.output}
    kept = [tensor for name, tensor in old.items() if name in used]
    kept += [numpy_helper.from_array(value, name) for name, value in target.constants.items()]
    for part, new in ((graph.node, target.nodes), (graph.initializer, kept)):
        del part[:]
        part.extend(new)
    return facts


def _tidy(proto: Any, facts: list[Facts]) -> None:
    """Recognisable names for the outputs and the batch, no traces of the exporting machine."""
    graph = proto.graph
    names = _name_nodes(graph)
    for i, value in enumerate(graph.output):
        names[value.name] = "output" if len(graph.output) == 1 else f"output_{i}"
    sources = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    names = {old: new for old, new in names.items() if old not in sources}
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for part in (node.input, node.output):
            for i, name in enumerate(part):
                part[i] = names.get(name, name)
    del graph.value_info[:], graph.metadata_props[:], proto.metadata_props[:], proto.functions[:]
    graph.name, proto.producer_name, proto.producer_version, proto.doc_string = "lsquant", "lsquant", __version__, ""
    for value in graph.output:
        value.name = names.get(value.name, value.name)
    for fact in facts:
        fact.input, fact.output = names.get(fact.input, fact.input), names.get(fact.output, fact.output)
    symbol = next((v.type.tensor_type.shape.dim[0].dim_param for v in graph.input if v.type.tensor_type.shape.dim), "")
    for value in [*graph.input, *graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if symbol and dim.dim_param:
                dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dim.dim_param)


def _name_nodes(graph: Any) -> dict[str, str]:
    """Name torch's nodes by the module they come from, ``bn1/Mul``; returns old value name -> new one."""
    taken = {node.name for node in graph.node}
    names = {}
    for node in graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), None)
        if scopes is None:
            continue
        parts = ast.literal_eval(scopes)
        base = "/".join(filter(None, [parts[-2] if len(parts) > 1 else "", node.op_type]))
        number, name = 1, base
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        node.name = name
        taken.add(name)
        if len(node.output) == 1:
            names[node.output[0]] = name
    return names


def _set_opset(proto: Any, wanted: int | None) -> None:
    """Label the graph with the lowest operator set in which every operator used is what the exporter wrote."""
    onnx = require("onnx", extra="onnx")
    written = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    since = {n.op_type: onnx.defs.get_schema(n.op_type, written, n.domain).since_version for n in proto.graph.node}
    # Q and DQ gained types and block sizes, not another meaning for what is used here
    since.update(dict.fromkeys({"QuantizeLinear", "DequantizeLinear", "Cast"} & set(since), LOWEST_OPSET))
    top = max(since, key=lambda name: since[name])
    lowest = max(since[top], LOWEST_OPSET)
    if wanted is not None and wanted < lowest:
        raise UsageError(f"export_onnx: opset={wanted} is too low, the operator {top} needs {lowest} in this model")
    version = wanted or lowest
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", version))
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)


def _write_metadata(proto: Any, profile: str, facts: list[Facts]) -> None:
    properties = {
        "lsquant.format": str(FORMAT),
        "lsquant.version": __version__,
        "lsquant.profile": profile,
        "lsquant.session": json.dumps(SESSION[profile]),
        "lsquant.layers": json.dumps([asdict(fact) for fact in facts]),
    }
    require("onnx", extra="onnx").helper.set_model_props(proto, properties)


# ---- reading ----


def load_onnx(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """(ModelProto, metadata) of a file that ``export_onnx`` wrote.

    metadata: profile, version, session (dict), layers (list of Facts).
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
        layers = [Facts(**entry) for entry in json.loads(properties["layers"])]
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
    """An ``onnxruntime.InferenceSession`` on the CPU with the options that the file recommends.

    overrides: ``providers=[...]``; an attribute of SessionOptions (``intra_op_num_threads=1``); or, with a dot in its
    name, a configuration entry (``**{"session.x64quantprecision": "0"}``).
    Raises: MissingExtra, MissingFile, DamagedFile; UsageError for an unknown option.
    """
    _, metadata = load_onnx(path)
    return make_session(os.fspath(path), metadata["session"], **overrides)


def make_session(source: str | bytes, recommended: dict[str, str], **overrides: Any) -> Any:
    """A session on a file or on a serialized model."""
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
    """Name -> array of every initializer."""
    numpy_helper = require("onnx", extra="onnx").numpy_helper
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
