"""The ONNX graph being written, what is recorded about each layer, and quantizers in standard operators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from lsquant._util.optional import require
from lsquant.integer import FrozenQuantizer

FLOAT = 1  # onnx.TensorProto.FLOAT


def array(t: Tensor) -> np.ndarray:
    """A contiguous NumPy copy."""
    return np.ascontiguousarray(t.detach().cpu().numpy())


@dataclass
class Graph:
    """Nodes and initializers being written.  prefix: what the names of the present layer's nodes begin with."""

    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    prefix: str = ""

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """An initializer, written once however often it is asked for."""
        self.constants[name] = np.asarray(value)
        return name

    def node(self, operator: str, inputs: list[str], output: str, label: str = "", **attributes: Any) -> str:
        """A node ``prefix/label`` with one output ``output``, which is returned."""
        name = f"{self.prefix}/{label or operator}"
        helper = require("onnx", extra="onnx").helper
        self.nodes.append(helper.make_node(operator, inputs, [output], name, **attributes))
        return output


@dataclass
class Facts:
    """Where the parts of one layer's call are found in the file; goes into its metadata as JSON.

    offset and weight_offset: what was added to the codes for storage.  weights: initializers of the codes, in the order
    of their groups.  transposed: stored (in, out).  layout: "" for output channels first; of a transposed convolution
    also "own", (in, out / groups, ...), or "reversed", with reversed kernels.  scales: initializers of fl(s_x s_w);
    weight_steps: of s_w.
    """

    layer: str
    call: int
    input: str
    output: str
    codes: str | None = None
    offset: int = 0
    input_step: str | None = None
    weights: list[str] = field(default_factory=list)
    weight_offset: int = 0
    transposed: bool = False
    layout: str = ""
    scales: list[str] = field(default_factory=list)
    weight_steps: list[str] = field(default_factory=list)


def quantize_in_float_range(graph: Graph, source: FrozenQuantizer, facts: Facts, name: str) -> str:
    """Codes in an int8 container (uint8 for 8-bit unsigned).

    The range is held by a float Clip, or by an integer Clip after rounding where there is a step per channel.
    """
    dtype = np.uint8 if source.q_max > 127 else np.int8
    steps = array(source.step)
    zero = np.zeros(steps.size, np.int32) if source.zero_point is None else array(source.zero_point)
    narrow = (source.q_min, source.q_max) != (np.iinfo(dtype).min, np.iinfo(dtype).max)
    x = facts.input
    axis: dict[str, Any] = {}
    if steps.size > 1:
        axis = {"axis": source.axis}
    else:
        steps, zero = steps.reshape(()), zero.reshape(())
        if narrow:
            edges = [np.float32(q - int(zero)) * np.float32(steps) for q in (source.q_min, source.q_max)]
            limits = [
                graph.constant(f"{name}.{edge}", np.float32(value))
                for edge, value in zip(("lowest", "highest"), edges, strict=True)
            ]
            x = graph.node("Clip", [x, *limits], f"{graph.prefix}/clipped")
    step = facts.input_step = graph.constant(f"{name}.input_step", steps)
    point = graph.constant(f"{name}.input_zero_point", zero.astype(dtype))
    facts.codes = f"{graph.prefix}/codes"
    per_channel = bool(axis) and narrow
    rounded = f"{graph.prefix}/rounded" if per_channel else facts.codes
    q = graph.node("QuantizeLinear", [x, step, point], rounded, **axis)
    if per_channel:
        limits = [graph.constant(f"{dtype.__name__}_{n}", dtype(n)) for n in (source.q_min, source.q_max)]
        q = graph.node("Clip", [q, *limits], facts.codes)
    return q


def dequantize(
    graph: Graph, codes: str, source: FrozenQuantizer, name: str, output: str, rank: int, standard: bool
) -> str:
    """``(code - z) * s`` back in float32: DequantizeLinear, or else Cast, Sub, Mul.

    The second form is for a quantized input beside a float weight: ONNX Runtime takes DequantizeLinear before a float
    weight, and QuantizeLinear after it, as the leave to quantize that weight by itself.
    """
    if standard:
        axis: dict[str, Any] = {"axis": source.axis} if source.step.numel() > 1 else {}
        return graph.node("DequantizeLinear", [codes, f"{name}.input_step", f"{name}.input_zero_point"], output, **axis)
    value = graph.node("Cast", [codes], f"{graph.prefix}/float_codes", to=FLOAT)
    trailing = [1] * (0 if source.axis is None else rank - 1 - source.axis % rank)
    if source.zero_point is not None:
        zero = array(source.zero_point).astype(np.float32).reshape(-1, *trailing)
        value = graph.node("Sub", [value, graph.constant(f"{name}.zero", zero)], f"{graph.prefix}/centred")
    step = graph.constant(f"{name}.step", array(source.step).reshape(-1, *trailing))
    return graph.node("Mul", [value, step], output)
