"""The operator set of a file."""

from __future__ import annotations

from typing import Any

from torch import nn

from lsquant._util.errors import UsageError
from lsquant._util.optional import require
from lsquant.formats.onnx.codes import NARROW, narrow_type
from lsquant.shipped import IntegerLayer

LOWEST_OPSET = 13
"""QuantizeLinear and DequantizeLinear have an axis from here on."""


def require_opset(wanted: Any) -> None:
    """Raise a UsageError for an operator set that there is not, or that the installed onnx does not know."""
    known = require("onnx", extra="onnx").defs.onnx_opset_version()
    if wanted is None:
        return
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= known:
        raise UsageError(
            f"export_onnx: opset={wanted!r} is not possible; the installed onnx writes {LOWEST_OPSET} to {known}, and "
            "without opset= the file has the lowest one that serves"
        )


def small_opset(frozen: nn.Module, wanted: int | None) -> int | None:
    """Return the operator set of a file of profile small: the lowest with the types that its weights fit in.

    wanted: another operator set, or None.

    Raises: UsageError for one without 4-bit types, where weights have 4 bits or fewer.
    """
    bounds = {m.weight_bounds for m in frozen.modules() if isinstance(m, IntegerLayer)}
    types = {str(narrow_type(*pair, NARROW[0][1])) for pair in bounds}
    best = next((since for bits, since in NARROW if any(name.endswith(f"int{bits}'>") for name in types)), None)
    lowest = NARROW[-1][1]
    if wanted is not None and best is not None and wanted < lowest:
        raise UsageError(f"export_onnx: opset={wanted} has no 4-bit type; profile='small' needs opset={lowest} or more")
    return wanted or best


def set_opset(proto: Any, wanted: int | None) -> None:
    """Label the graph with the lowest operator set in which every operator used is what the exporter wrote.

    wanted: another operator set, or None.

    Raises: UsageError naming the operator for which ``wanted`` is too low.
    """
    onnx = require("onnx", extra="onnx")
    written = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    own = [n for n in proto.graph.node if n.domain in ("", "ai.onnx")]
    others = sorted({n.domain for n in proto.graph.node} - {"", "ai.onnx"})
    since = {n.op_type: onnx.defs.get_schema(n.op_type, written, n.domain).since_version for n in own}
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
    proto.opset_import.extend(onnx.helper.make_opsetid(domain, 1) for domain in others)
