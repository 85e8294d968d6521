"""Writes ONNX files whose integers are the trained ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lsquant._util.batches import evaluating, model_inputs, run_batch, unwrapped
from lsquant._util.entry import shown
from lsquant._util.errors import UsageError
from lsquant._util.files import atomic_write_bytes
from lsquant._util.nested import tensors_in
from lsquant._util.optional import require
from lsquant._version import __version__
from lsquant.formats.onnx.capture import TORCH_OPSET, captured
from lsquant.formats.onnx.graph import Graph, LayerTrace
from lsquant.formats.onnx.integer import FORMS, integer_proto
from lsquant.formats.onnx.lowering import lower
from lsquant.formats.onnx.opset import require_opset, set_opset, small_opset
from lsquant.formats.onnx.reader import FORMAT
from lsquant.formats.onnx.tables import tables
from lsquant.formats.onnx.tidy import tidy
from lsquant.fusion import FusedNetwork, fuse
from lsquant.shipped import integer_model, require_all_shippable, ship

BY_BYTES = {"session.x64quantprecision": "1"}
SESSION: dict[str, dict[str, str]] = {"exact": {}, "qdq": BY_BYTES, "small": {}, "integer": BY_BYTES}
"""Profile -> recommended configuration entries of the session (docs/deployment.md has the measurements).  Of "integer"
only where a weight has codes for which two products may leave 16 bits: processors without VNNI add them there."""
INT8_SESSION = {"session.qdqisint8allowed": "1"}
"""Of integer-only files with int8 codes, which ONNX Runtime on x86 else computes in floating point.  With the other
option it asks for kernels that it does not have."""


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    profile: str = "exact",
    opset: int | None = None,
    form: str = "qdq",
) -> Path:
    """Write a model in eval mode as an ONNX file with a dynamic batch dimension.

    The file is written aside and renamed.

    model: the trained model, which is unchanged.
    path: of the file.  Returned.
    example_inputs: one batch as for ``calibrate``: a tensor; a tuple or list, whose first element counts; a mapping of
        keywords for a model with several inputs.  The first dimension of each tensor is the batch.
    profile: "exact", integer sums equal to the trained layers; "small", the same with weights of 2 bits as INT2 or
        UINT2 and of 3 and 4 bits as INT4 or UINT4 (opset 25 and 21; with opset=21 all of 4 bits); "qdq", standard
        QuantizeLinear and DequantizeLinear around float operators; or "integer", the integer-only form of a network
        that was prepared with ``Recipe(..., joins=8)`` (docs/integer-only.md), its weights of at most 4 bits as INT4
        (opset 21; with opset=25 those of 2 bits as INT2, with less bytes).
    opset: the file's operator set; default: the lowest one that has all the operators and types used.
    form: of profile "integer": "qdq", QuantizeLinear and DequantizeLinear, which runtimes fuse to integer operators; or
        "qoperator", integer operators of ONNX Runtime.

    Raises: UsageError for an unknown profile, an unset step (naming the layer), a model without quantized layers, an
        opset that is too low (naming the operator); MissingExtra without onnx.
    """
    proto = onnx_model(model, example_inputs, profile=profile, opset=opset, form=form)
    atomic_write_bytes(path, proto.SerializeToString(deterministic=True))
    return Path(path)


def onnx_model(
    model: nn.Module,
    example_inputs: Any,
    *,
    profile: str = "exact",
    opset: int | None = None,
    dynamic_batch: bool = True,
    form: str = "qdq",
) -> Any:
    """Return the ModelProto that ``export_onnx`` writes.

    dynamic_batch: whether the batch dimension is free; otherwise the batch has the size of the example's.
    """
    model = unwrapped(model)
    if profile not in SESSION:
        known = ", ".join(map(repr, SESSION))
        raise UsageError(f"export_onnx: profile={profile!r} is unknown; choose from {known}")
    require("onnx", extra="onnx")
    require("onnxscript", extra="onnx")
    require_opset(opset)
    floats = [(name, p.dtype) for name, p in model.named_parameters() if p.is_floating_point()]
    others = [(name, dtype) for name, dtype in floats if dtype != torch.float32]
    if others and not any(t.is_floating_point() for t in tensors_in(model_inputs(example_inputs))):  # as of token ids
        raise UsageError(f"export_onnx: {others[0][0]} is of type {others[0][1]}; give a float32 model: model.float()")
    if form not in FORMS:
        raise UsageError(f"export_onnx: form={shown(form)}; choose from {', '.join(map(repr, FORMS))}")
    if profile == "integer":
        network = model if isinstance(model, FusedNetwork) else fuse(model)
        require_all_shippable(network.model)
        with evaluating(network):
            run_batch(network, example_inputs)
            proto, writer, opset = integer_proto(network, example_inputs, form, opset, dynamic_batch)
        session = INT8_SESSION if network.joins.container != "uint8" else BY_BYTES if writer.has_wide else {}
        return _finished(network, proto, writer.traces, profile, session, opset)
    if isinstance(model, FusedNetwork):
        raise UsageError(f"export_onnx: a fused network is written by profile='integer', not {profile!r}")
    with evaluating(model):
        record = ship(model)
        run_batch(model, example_inputs)  # what the model refuses no file accepts
        frozen = integer_model(record)
    opset = small_opset(frozen, opset) if profile == "small" else opset
    proto, layers = captured(frozen, example_inputs, opset or TORCH_OPSET, dynamic_batch)
    traces = _replace_marked(proto.graph, layers, profile, opset or TORCH_OPSET)
    return _finished(frozen, proto, traces, profile, SESSION[profile], opset)


def _finished(
    module: nn.Module, proto: Any, traces: list[LayerTrace], profile: str, session: dict[str, str], opset: int | None
) -> Any:
    """Name, label and check a graph.  module: what it was made of."""
    onnx = require("onnx", extra="onnx")
    tidy(proto, traces)
    set_opset(proto, opset)
    _write_metadata(proto, profile, session, traces)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        ceiling = [name for name, part in module.named_modules() if getattr(part, "ceil_mode", False)]
        look = (
            f"it has {ceiling[0]!r} with ceil_mode=True: PyTorch and ONNX count windows that begin beyond the input "
            "otherwise"
            if ceiling
            else "look for inputs, layers or buffers of one name"
        )
        reason = next(iter(str(error).splitlines()), "")
        raise UsageError(f"export_onnx: onnx refuses the graph of this model: {reason}; {look}") from error
    return proto


def _replace_marked(graph: Any, layers: dict[str, nn.Module], profile: str, opset: int) -> list[LayerTrace]:
    """Lower every marked node in place.  Returns the traces, like the nodes in order of execution."""
    numpy_helper = require("onnx", extra="onnx").numpy_helper
    shapes = {
        v.name: [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim]
        for v in [*graph.input, *graph.value_info, *graph.output]
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}  # of indices that are constants
    target, traces, calls = Graph(tables=tables(layers, profile, opset)), [], {}
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
        trace = LayerTrace(layer, call, node.input[0], output)
        lower(target, layers[layer], trace, (shapes[sources[0]], shapes[node.output[0]]), profile, opset)
        traces.append(trace)
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
    return traces


def _write_metadata(proto: Any, profile: str, session: dict[str, str], traces: list[LayerTrace]) -> None:
    properties = {
        "lsquant.format": str(FORMAT),
        "lsquant.version": __version__,
        "lsquant.profile": profile,
        "lsquant.session": json.dumps(session),
        "lsquant.layers": json.dumps([trace.to_dict() for trace in traces], separators=(",", ":")),
    }
    require("onnx", extra="onnx").helper.set_model_props(proto, properties)
