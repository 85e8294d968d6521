"""Names in a written graph, without what the exporter and its machine left in it."""

from __future__ import annotations

import ast
import re
from typing import Any

from lsquant._util.optional import require
from lsquant._version import __version__
from lsquant.formats.onnx.graph import LayerTrace


def tidy(proto: Any, traces: list[LayerTrace]) -> None:
    """Give nodes, outputs and the batch recognisable names, and remove what tells of the exporting machine."""
    graph = proto.graph
    _own_outputs(graph)
    names = _name_nodes(graph)
    names |= _names_of_ends(graph, names)
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for part in (node.input, node.output):
            for i, name in enumerate(part):
                part[i] = names.get(name, name)
    del graph.value_info[:], graph.metadata_props[:], proto.metadata_props[:], proto.functions[:]
    graph.name, proto.producer_name, proto.producer_version, proto.doc_string = "lsquant", "lsquant", __version__, ""
    for value in [*graph.input, *graph.output]:
        value.name = names.get(value.name, value.name)
    for trace in traces:
        trace.input = names.get(trace.input, trace.input)
        trace.output = names.get(trace.output, trace.output)
    symbol = next((v.type.tensor_type.shape.dim[0].dim_param for v in graph.input if v.type.tensor_type.shape.dim), "")
    for value in [*graph.input, *graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if symbol and dim.dim_param:
                dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dim.dim_param)


def _own_outputs(graph: Any) -> None:
    """Let every output be a value of its own: not an input or an initializer, and not that of another output."""
    helper = require("onnx", extra="onnx").helper
    taken = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    for i, value in enumerate(graph.output):
        if value.name in taken:
            copy = f"{value.name}/copy_{i}"
            graph.node.append(helper.make_node("Identity", [value.name], [copy], f"Identity_output_{i}"))
            value.name = copy
        taken.add(value.name)


def _names_of_ends(graph: Any, inner: dict[str, str]) -> dict[str, str]:
    """Return new names of outputs, ``output`` or ``output_0`` and on, and of inputs that torch had to rename for them.

    inner: the new names of inner values.  A name that an input or another value has gets a further "_".
    """
    names: dict[str, str] = {}
    outputs = [value.name for value in graph.output]
    inputs = [value.name for value in graph.input]
    for old in inputs:
        if old.endswith("_orig") and old.removesuffix("_orig") in outputs:
            names[old] = old.removesuffix("_orig")
    values = {name for node in graph.node for name in node.output if name not in outputs}
    taken = {names.get(name, name) for name in inputs} | {t.name for t in graph.initializer}
    taken |= {inner.get(name, name) for name in values}
    for i, old in enumerate(outputs):
        new = "output" if len(outputs) == 1 else f"output_{i}"
        while new in taken:
            new += "_"
        taken.add(new)
        names[old] = new
    return names


def _name_nodes(graph: Any) -> dict[str, str]:
    """Name torch's nodes by the module they come from, ``bn1/Mul``.  Returns old value name -> new one."""
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
