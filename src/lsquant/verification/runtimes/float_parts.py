"""What a runtime computes in floating point of an integer-only file, by layer, and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lsquant.fusion import FusedNetwork
from lsquant.program import Kind

INTEGER = frozenset((
    "QuantizeLinear", "DequantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm",
    "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearGlobalAveragePool",
    "QLinearAveragePool", "QLinearConcat", "QLinearSoftmax", "QLinearWhere", "Min", "Max",
))  # fmt: skip
"""Operators over codes, and those that lead to codes and back."""
MOVES = frozenset((
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Concat", "Split", "Pad", "Resize", "Gather",
    "DepthToSpace", "MaxPool", "NhwcMaxPool", "Identity", "Cast", "Expand", "Tile", "Shape", "Constant",
    "ConstantOfShape", "Range",
))  # fmt: skip
"""Operators that move values or choose among them, whatever their type."""


LAST = ("Add", "Mul", "Relu", "Clip")
"""Of a last layer: its bias over int32, the scale that makes its sums real, and the limit of these."""
IN_FLOAT = "in floating point in "


def float_operators(graph: Any) -> list[tuple[str, str]]:
    """Return (name, operator) of the nodes of a graph that compute in floating point."""
    return [(node.name, node.op_type) for node in graph.node if node.op_type not in INTEGER | MOVES or _blends(node)]


def _blends(node: Any) -> bool:
    """Tell whether a node is a Resize that computes values between others."""
    modes = [attribute.s for attribute in node.attribute if attribute.name == "mode"]
    return node.op_type == "Resize" and bool(modes) and modes != [b"nearest"]


def says_float_parts(network: FusedNetwork, graph: Any, runtime: str) -> str:
    """Return in a sentence what stays in floating point, by layer, and why; "" where nothing does.

    graph: the runtime's optimised one.
    """
    steps = {step.name: step for step in network.program.steps}
    inside: dict[str, list[str]] = {}
    outside: Counter[str] = Counter()
    stored = network.program.stored
    for name, kind in float_operators(graph):
        layer = next((part for part in _prefixes(name) if part in steps), None)
        if layer is not None and kind in LAST and stored[steps[layer].end] is None and steps[layer].kind is Kind.LAYER:
            continue
        if layer is None or steps[layer].kind is Kind.FLOAT:
            outside[kind] += 1
        else:
            inside.setdefault(layer, []).append(kind)
    says = []
    for layer, kinds in inside.items():
        step = steps[layer]
        why = "a function without an integer operator" if step.kind is Kind.FUNCTION else "not fused"
        says.append(f"{layer} ({', '.join(dict.fromkeys(kinds))}: {why})")
    if outside:
        listed = ", ".join(f"{kind} x {count}" if count > 1 else kind for kind, count in outside.items())
        floats = list(dict.fromkeys(step.name for step in network.program.floats))
        named = f" of {_few(floats)}" if floats else ""
        says.append(f"{listed}{named} (float parts of the network, of which fuse has no integer form)")
    return f"{IN_FLOAT}{runtime}: {'; '.join(says)}" if says else ""


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _prefixes(name: str) -> list[str]:
    """Return what may be the layer in a node's name, the longest first: of ``a.b/c/d`` both ``a.b/c`` and ``a.b``."""
    parts = name.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
