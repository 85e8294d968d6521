"""Profile integer: the program of an integer-only network as ONNX operators over codes of 8 bits.

The container of stored tensors is that of the recipe's target.  uint8: an unsigned code as it is with zero point z, a
signed one as code + 128 with zero point z + 128 (z = 0 but for LSQ+).  int8: the same less 128.  Codes of fewer than 8
bits, and limits (ReLU where z is not the lowest code, ReLU6), are held in range by Min and Max over codes; else a ReLU
is the saturation of the container itself.  symmetric: int8 with zero point 0, only QuantizeLinear and DequantizeLinear
touch codes, and a float Relu or Clip before QuantizeLinear holds them in range.  The two forms are:

- qdq: DequantizeLinear, a float operator, QuantizeLinear; runtimes fuse the three to one integer operator.  Scales and
  zero points of tensors are 0-d, as ONNX Runtime's fusion of additions wants them.
- qoperator: QLinearConv, and of the domain com.microsoft QLinearAdd, QLinearGlobalAveragePool and QGemm.  Nothing has
  to be fused, so the integers are the same at every level of optimisation.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lsquant import nn as lnn
from lsquant._util.batches import model_inputs
from lsquant._util.errors import UsageError
from lsquant._util.optional import require
from lsquant.dataflow import Node
from lsquant.formats.onnx.capture import TORCH_OPSET, exported
from lsquant.formats.onnx.codes import NARROW, narrow_type
from lsquant.formats.onnx.graph import FLOAT, INT8, INT32, Graph, LayerTrace, array
from lsquant.formats.subpixel import Spread, as_written, spread_of
from lsquant.fusion.arithmetic import Codes, Folded
from lsquant.fusion.functions import all_codes, function_quotients, has_gate, is_safe
from lsquant.fusion.network import FusedNetwork, Run, averaged, limits_of
from lsquant.nn.pool import is_windowed, sizes_of, window_geometry, window_size
from lsquant.program import Kind, Step, gives_parts, output_nodes
from lsquant.reference_integer import FUNCTION_MARGIN, GATE_STEP

FORMS = ("qdq", "qoperator")
MICROSOFT = "com.microsoft"
MOST_SCALED = 2.0**-32, 2.0**8
"""Between these has to be what ONNX Runtime's average multiplies sums by."""
MOST_ADDED = 2.0**12
"""By how much the step of an addition's operands may exceed that of their sum: ONNX Runtime rounds on the way."""
END = 2**63 - 1
"""The end of a slice that goes to the last element, whatever the size."""
INT4_SINCE = dict(NARROW)[4]
MOST_FOR_ANY_ZERO = 64
"""The largest weight of which two products with any byte fit 16 bits, where processors without VNNI add them."""
SHIFT = 128
"""What is added to a signed code for storage as uint8."""
SYMMETRIC = "symmetric"
ROWS = {"transB": 1}
"""The attributes of a product of a matrix with one row for each position; others are of convolutions."""
_MICROSOFT_OPERATORS = (
    "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearGlobalAveragePool", "QGemm",
)  # fmt: skip
_FUNCTIONS: dict[type, Any] = {
    nn.Sigmoid: lambda m: ("Sigmoid", 4e-7, {}),
    nn.LeakyReLU: lambda m: ("LeakyRelu", 2e-7, {"alpha": float(m.negative_slope)}),
    nn.Tanh: lambda m: ("Tanh", 6e-7, {}),
    nn.Hardswish: lambda m: ("HardSwish", 6e-7, {}),
    nn.Hardsigmoid: lambda m: ("HardSigmoid", 2e-7, {"alpha": 1.0 / 6.0, "beta": 0.5}),
    nn.ELU: lambda m: ("Elu", 4e-7, {"alpha": float(m.alpha)}),
    nn.GELU: lambda m: ("Erf" if m.approximate == "none" else "", 2e-6, {}),
    nn.SiLU: lambda m: ("Silu", 4e-7, {}),
}
"""Float type -> operator, twice the largest error of ONNX Runtime's that was seen for inputs up to 20, attributes.
SiLU's error is that for inputs up to 1, and grows with them."""


@dataclass(frozen=True)
class Scale:
    """The scale and the zero point of a tensor in the file: initializers, 0-d.

    shift: what is added to its codes less their z: the zero point in the container.
    container: numpy.uint8 or numpy.int8.
    """

    step: str
    zero: str
    shift: int
    container: Any


def require_single(run: Run) -> None:
    """Raise UsageError naming a step over codes that gives several tensors which are not taken one by one."""
    readers = run.program.flow.readers
    for step in run.program.steps:
        if gives_parts(step.node) and any(node.call.target is not operator.getitem for node, _ in readers[step.end]):
            kind = type(step.module).__name__
            raise UsageError(
                f"{step.name}: the parts of this {kind} have to be taken one by one: a, b = {step.name}(x)"
            )


class _MarkedRun(Run):
    """A forward pass in which every step over codes is a marked node, to be lowered."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.program, run.steps)
        require_single(run)
        self.example = run
        self.number = {step: str(i) for i, step in enumerate(run.program.steps)}

    def compute(self, step: Step) -> None:
        if step.kind is Kind.FLOAT:
            self.real_step(step)
            return
        if gives_parts(step.node):  # each part is a slice of what is cut
            self.stored[step.end] = self.stored[step.node.inputs[0]]
            return
        quantizes = step.kind is Kind.QUANTIZE
        sources = (step.node,) if quantizes else step.node.inputs
        values = [(self.real if quantizes else self.stored)[source] for source in sources]
        is_stored = self.program.stored[step.end] is not None
        example = (self.example.stored if is_stored else self.example.real)[step.end]
        made = self.mark("Step", values, self.number[step], example.shape)
        (self.stored if is_stored else self.real)[step.end] = made

    def real_of(self, node: Node) -> Any:
        if node not in self.real:
            self.real[node] = self.mark("Real", [self.stored[node]], node.name, self.example.stored[node].shape)
        return self.real[node]

    def real_step(self, step: Step) -> None:
        module = step.module
        if isinstance(module, lnn.QuantizedLayer):
            raise UsageError(f"{step.name}: {type(module).__name__} has no integer form in ONNX; use profile='exact'")
        if isinstance(module, lnn.ExactBatchNorm):  # the operator of its own has no translation
            (x,) = self.mapped(step.node.call.args)
            alpha, beta = (t.reshape(-1, *[1] * (x.dim() - 2)) for t in module.affine_constants())
            self.real[step.end] = x * alpha + beta
            return
        super().real_step(step)

    @staticmethod
    def mark(kind: str, inputs: list[Tensor], name: str, shape: torch.Size) -> Tensor:
        sizes = (inputs[0].shape[0], *shape[1:])
        return torch.onnx.ops.symbolic(
            f"lsquant::{kind}", inputs, attrs={"layer": name}, dtype=torch.float32, shape=sizes, version=1
        )


class MarkedNetwork(nn.Module):
    """What torch's exporter sees of a fused network.  run: of it over an example."""

    def __init__(self, network: FusedNetwork, run: Run) -> None:
        super().__init__()
        self.network = network
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _MarkedRun(self.run).outputs(self.network.given(args, kwargs))


class Writer:
    """Lowers the marked nodes of one network.

    graph: that is written.
    run: of the network over an example, with its constants.
    form: one of FORMS.
    opset: of the file, which decides whether weights of few bits are INT4 or INT2.
    container: of stored tensors, one of ``spec.CONTAINERS``.
    """

    def __init__(self, graph: Graph, run: Run, form: str, opset: int, container: str = "uint8") -> None:
        self.graph, self.run, self.form, self.opset, self.container = graph, run, form, opset, container
        self.has_narrow = self.has_wide = False
        self.traces: list[LayerTrace] = []
        self.steps = run.program.steps
        self.nodes = {node.name: node for node in run.program.flow.nodes}

    def lower(self, kind: str, name: str, inputs: list[str]) -> str:
        """Write what a marked node stands for.  Returns the name of its output."""
        if kind == "Real":
            self.graph.prefix = name
            return self._real(inputs[0], self.scale(self.nodes[name]), f"{name}/value", "Dequantize_value")
        return self.step(self.steps[int(name)], inputs)

    def step(self, step: Step, inputs: list[str]) -> str:
        """Write a step over codes.  Returns the name of its output."""
        if gives_parts(step.node):
            return inputs[0]
        self.graph.prefix = step.name
        output = _LOWER[step.kind](self, step, inputs, f"{step.name}/output")
        self.traces.append(self._trace(step, inputs[0], output))
        return output

    def _trace(self, step: Step, source: str, output: str) -> LayerTrace:
        """Return where a step is in the file."""
        trace = LayerTrace(step.name, 0, source, output)
        if self.run.program.stored[step.end] is not None:
            scale, zero = self.scale(step.end), self.run.grid(step.end).zero
            trace = LayerTrace(step.end.name, 0, source, output, output, scale.shift - zero, scale.step)
        if step.kind is Kind.LAYER:
            trace.weights, trace.weight_steps = [f"{step.name}.weight"], [f"{step.name}.weight_step"]
        return trace

    def finish(self) -> None:
        """Leave out of traces and constants what no node has: a table, say, holds no step."""
        used = {name for node in self.graph.nodes for name in node.input}
        self.graph.constants = {name: value for name, value in self.graph.constants.items() if name in used}
        for trace in self.traces:
            trace.weight_steps = [name for name in trace.weight_steps if name in used]
            trace.scales = [f"{name}.scale" for name in [trace.layer] if f"{name}.scale" in used]
            trace.input_step = trace.input_step if trace.input_step in used else None

    def node(self, operator: str, inputs: list[str], output: str, label: str = "", **attributes: Any) -> str:
        """Add a node; of the domain com.microsoft, where the operator is one of it."""
        if operator in _MICROSOFT_OPERATORS:
            attributes["domain"] = MICROSOFT
        return self.graph.node(operator, inputs, output, label, **attributes)

    # ---- tensors ----

    def scale(self, node: Node) -> Scale:
        """Return the scale and the zero point of a stored tensor."""
        quantizer = self.run.program.stored[node]
        assert quantizer is not None
        return self._scale(self.run.grid(node), quantizer.name)

    def _scale(self, grid: Codes, name: str) -> Scale:
        step = self.graph.constant(f"{name}.step", np.float32(grid.step.item()))
        return self._held(step, signed=grid.low + grid.zero < 0, zero=grid.zero)

    def _held(self, step: str, signed: bool, zero: int = 0) -> Scale:
        """Return how codes are held in the container.  zero: their z."""
        shift = {"uint8": SHIFT * signed, "int8": SHIFT * signed - SHIFT, SYMMETRIC: 0}[self.container] + zero
        kind = np.uint8 if self.container == "uint8" else np.int8
        return Scale(step, self.graph.constant(f"zero_point_{shift}", kind(shift)), shift, kind)

    def _saturating(self, grid: Codes, name: str) -> Scale:
        """Return a scale for codes that can only be too high: the highest is where the container saturates."""
        kind = np.uint8 if self.container == "uint8" else np.int8
        shift = int(np.iinfo(kind).max) - grid.high
        step = self.graph.constant(f"{name}.step", np.float32(grid.step.item()))
        return Scale(step, self.graph.constant(f"zero_point_{shift}", kind(shift)), shift, kind)

    def _real(self, codes: str, scale: Scale, output: str, label: str = "") -> str:
        return self.node("DequantizeLinear", [codes, scale.step, scale.zero], output, label)

    def _codes(self, real: str, scale: Scale, grid: Codes, output: str, label: str = "") -> str:
        """Write QuantizeLinear and what holds codes in range."""
        if self.container == SYMMETRIC:
            real = self._limited(real, scale, grid, output, label and f"{label}_limit")
            return self.node("QuantizeLinear", [real, scale.step, scale.zero], output, label)
        clipped = self._clip_nodes(grid, scale)
        raw = f"{output}/raw" if clipped else output
        self.node("QuantizeLinear", [real, scale.step, scale.zero], raw, label)
        return self._within(raw, clipped, output, label and "_input")

    @staticmethod
    def _clip_nodes(grid: Codes, scale: Scale) -> list[tuple[str, int]]:
        low, high, held = grid.low + scale.shift, grid.high + scale.shift, np.iinfo(scale.container)
        return [("Max", low)] * (low > held.min) + [("Min", high)] * (high < held.max)

    def _limited(self, real: str, scale: Scale, grid: Codes, output: str, label: str) -> str:
        """Write the float Relu or Clip that holds codes in range; what QuantizeLinear saturates at needs none."""
        held = np.iinfo(scale.container)
        if grid.low <= held.min and grid.high >= held.max:
            return real
        if grid.low == 0 and grid.high >= held.max:
            return self.node("Relu", [real], f"{output}/limited", label)
        step, edges = self.graph.constants[scale.step], {"lowest": grid.low, "highest": grid.high}
        ends = [self.graph.constant(f"{output}.{edge}", np.float32(code) * step) for edge, code in edges.items()]
        return self.node("Clip", [real, *ends], f"{output}/limited", label)

    def _moved(
        self, operator: str, inputs: list[str], output: str, node: Node, label: str = "", **attributes: Any
    ) -> str:
        """Write an operator that moves codes; in the container "symmetric" it moves real values of the same scale.

        inputs: codes, and constants.
        node: a tensor with the scale of the codes.
        """
        if self.container != SYMMETRIC:
            return self.node(operator, inputs, output, label, **attributes)
        scale, label, reals = self.scale(node), label or operator, []
        for i, x in enumerate(inputs):
            is_codes = bool(x) and x not in self.graph.constants
            reals.append(self._real(x, scale, f"{output}/{label}_{i}", f"{label}_Dequantize_{i}") if is_codes else x)
        real = self.node(operator, reals, f"{output}/{label}", label, **attributes)
        return self.node("QuantizeLinear", [real, scale.step, scale.zero], output, f"{label}_Quantize")

    def _within(self, codes: str, clipped: list[tuple[str, int]], output: str, label: str = "") -> str:
        for i, (kind, bound) in enumerate(clipped):
            name = self.graph.constant(f"{self.container}_{bound}", np.dtype(self.container).type(bound))
            end = output if i == len(clipped) - 1 else f"{output}/{kind}"
            codes = self.node(kind, [codes, name], end, f"{kind}{label}")
        return codes

    # ---- steps ----

    def quantize(self, step: Step, inputs: list[str], output: str) -> str:
        return self._codes(inputs[0], self.scale(step.end), self.run.grid(step.end), f"{step.name}/codes")

    def layer(self, step: Step, inputs: list[str], output: str) -> str:
        """Write a layer, and the limit behind one whose output is real."""
        if step.limit is None or self.run.program.stored[step.end] is not None:
            return self._any_rank(step, inputs, output)
        real = self._any_rank(step, inputs, f"{step.name}/unlimited")
        low, high = limits_of(step.limit)
        if isinstance(step.limit, nn.ReLU):
            return self.node("Relu", [real], output)
        ends = ["" if v is None else self.graph.constant(f"float_{v!r}", np.float32(v)) for v in (low, high)]
        return self.node("Clip", [real, *ends], output)

    def _any_rank(self, step: Step, inputs: list[str], output: str) -> str:
        """Write a layer; a linear one over more than two dimensions as a matrix with a row for each position."""
        shape = self.run.stored[step.node.inputs[0]].shape
        if not isinstance(step.module, nn.Linear) or len(shape) == 2:
            return self._layer(step, inputs[0], output)
        rows = [inputs[0], self._shape([-1, shape[-1]])]
        x = self._moved("Reshape", rows, f"{step.name}/rows", step.node.inputs[0], "Reshape_input")
        found = self._layer(step, x, f"{step.name}/rows_output")
        sizes = self._shape([-1, *shape[1:-1], step.module.out_features])
        return self._behind(step, "Reshape", [found, sizes], output, "Reshape_output")

    def _behind(
        self, step: Step, operator: str, inputs: list[str], output: str, label: str = "", **attributes: Any
    ) -> str:
        """Write an operator that moves what a step has made, codes or real values."""
        if self.run.program.stored[step.end] is None:
            return self.node(operator, inputs, output, label, **attributes)
        return self._moved(operator, inputs, output, step.end, label, **attributes)

    def _shape(self, sizes: list[int]) -> str:
        return self.graph.constant("shape_" + "_".join(map(str, sizes)), np.array(sizes, np.int64))

    def _layer(self, step: Step, source: str, output: str) -> str:
        x, scale = self._read(step, source)
        layer, name = step.module, step.name
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise UsageError(f"{name}: padding_mode={layer.padding_mode!r} has no integer form; use 'zeros'")
        constants = as_written(layer, self.run.constants[step], name, "export_onnx")
        spread, read = spread_of(layer, name, "export_onnx"), self.run.read_grid(step)
        if spread is None and self._is_real_pointwise(step):
            return self._pointwise(step, x, scale, read, constants, output)
        if spread is None:
            geometry = ROWS if isinstance(layer, nn.Linear) else _geometry(layer, layer.padding_sides())
            return self._products(step, x, scale, read, constants, geometry, output)
        ones = [1] * len(spread.kernel)
        geometry = _attributes(spread.kernel, ones, spread.padding, ones, layer.groups)
        y = self._products(step, x, scale, read, constants, geometry, f"{output}/channels")
        return self._spread(step, y, spread, output)

    def _is_real_pointwise(self, step: Step) -> bool:
        """True for a last convolution without a window, in containers for which ConvInteger is written."""
        layer, is_real = step.module, self.run.program.stored[step.end] is None
        if isinstance(layer, nn.Linear) or not is_real or self.container == SYMMETRIC or layer.groups > 1:
            return False
        sizes = (*layer.kernel_size, *layer.stride)
        return all(size == 1 for size in sizes) and not any(map(any, layer.padding_sides()))

    def _pointwise(self, step: Step, x: str, scale: Scale, read: Codes, constants: Folded, output: str) -> str:
        """Write a convolution without a window as the matrix product that it is: runtimes are faster at it."""
        name, shape = step.name, self.run.stored[step.node.inputs[0]].shape
        n, out = len(shape), len(constants.codes)
        turned = self.node("Transpose", [x], f"{name}/last", "Transpose_input", perm=[0, *range(2, n), 1])
        rows = self.node("Reshape", [turned, self._shape([-1, shape[1]])], f"{name}/rows", "Reshape_input")
        flat = constants._replace(codes=constants.codes.reshape(out, -1))
        real = self._products(step, rows, scale, read, flat, ROWS, f"{name}/rows_output")
        sizes = self._shape([-1, *shape[2:], out])
        last = self.node("Reshape", [real, sizes], f"{name}/last_output", "Reshape_output")
        return self.node("Transpose", [last], output, "Transpose_output", perm=[0, n - 1, *range(1, n - 1)])

    def _spread(self, step: Step, y: str, spread: Spread, output: str) -> str:
        """Write what spreads channels over space, and crops."""
        s, n = spread.block, len(spread.kernel)
        is_cropped = any(map(any, spread.crop))
        target = f"{output}/spread" if is_cropped else output
        if s > 1 and n == 2:
            y = self._behind(step, "DepthToSpace", [y], target, blocksize=s, mode="CRD")
        elif s > 1:
            channels = step.module.out_channels
            parts = self._behind(step, "Reshape", [y, self._shape([0, channels, s, -1])], f"{output}/parts")
            turned = self._behind(step, "Transpose", [parts], f"{output}/turned", perm=[0, 1, 3, 2])
            y = self._behind(step, "Reshape", [turned, self._shape([0, channels, -1])], target, "Reshape_spread")
        if not is_cropped:
            return y if s > 1 else self._behind(step, "Identity", [y], output)
        edges = [(2 + d, before, -after or END) for d, (before, after) in enumerate(spread.crop)]
        return self._slice(step, y, [(axis, start, end, 1) for axis, start, end in edges], output)

    def _slice(self, step: Step, x: str, edges: list[tuple[int, int, int, int]], output: str) -> str:
        """Write a slice.  edges: (axis, start, end, step)."""
        name = step.name
        columns = zip(("axes", "starts", "ends", "steps"), zip(*edges, strict=True), strict=True)
        held = {n: self.graph.constant(f"{name}.{n}", np.array(v, np.int64)) for n, v in columns}
        return self._behind(step, "Slice", [x, *(held[n] for n in ("starts", "ends", "axes", "steps"))], output)

    def _products(
        self, step: Step, x: str, scale: Scale, read: Codes, constants: Folded, geometry: dict[str, Any], output: str
    ) -> str:
        """Write the products of a layer, or the sums of windows: codes, or real values.

        x: the codes that are multiplied; scale, read: theirs.
        constants: as the file holds them.
        """
        name, is_linear = step.name, geometry is ROWS
        codes = constants.codes.to(torch.int8)
        low, high = int(codes.min()), int(codes.max())
        assert -128 <= low <= high <= 127
        self.has_wide = self.has_wide or max(-low, high) > MOST_FOR_ANY_ZERO
        narrow = None if self.container == SYMMETRIC else narrow_type(low, high, self.opset)
        weight = self._weight(name, array(codes), narrow)
        steps = self.graph.constant(f"{name}.weight_step", array(constants.step))
        zeros = self.graph.constant(f"{name}.weight_zero_point", np.zeros(len(constants.step), np.int8))
        bias = self._bias(name, read, constants)
        stored = self.run.program.stored[step.end] is not None
        out = self.scale(step.end) if stored else None
        grid = self.run.limited(step) if stored else None
        symmetric = self.container == SYMMETRIC
        if self.form == "qoperator" or (out is None and not is_linear and not symmetric):
            given = [x, weight, steps, zeros, bias]
            return self._layer_operator(step, given, scale, out, grid, output, geometry, read, constants)
        real = self._real(x, scale, f"{name}/input", "Dequantize_input")
        w = self.node("DequantizeLinear", [weight, steps, zeros], f"{name}/weight", "Dequantize_weight", axis=0)
        if symmetric:
            b = bias
        else:
            scales = self.graph.constant(f"{name}.bias_step", array(read.step * constants.step))
            shift = self.graph.constant(f"{name}.bias_zero_point", np.zeros(len(constants.step), np.int32))
            b = self.node("DequantizeLinear", [bias, scales, shift], f"{name}/bias", "Dequantize_bias", axis=0)
        operator = "Gemm" if is_linear else "Conv"
        y = self.node(operator, [real, w, b], output if grid is None else f"{name}/sum", **geometry)
        return y if grid is None or out is None else self._codes(y, out, grid, output)

    def _bias(self, name: str, read: Codes, constants: Folded) -> str:
        """Write b as int32; in the container "symmetric" as ``fl(b s_x s_w)``, which says b exactly."""
        if self.container == SYMMETRIC:
            return self.graph.constant(f"{name}.bias", array(constants.bias.float() * (read.step * constants.step)))
        return self.graph.constant(f"{name}.bias", array(constants.bias).astype(np.int32))

    def _weight(self, name: str, codes: np.ndarray, narrow: Any) -> str:
        """Write the codes of a weight; as INT4 or INT2 with a Cast, which runtimes compute once."""
        self.has_narrow = self.has_narrow or narrow is not None
        held = self.graph.constant(f"{name}.weight", codes if narrow is None else codes.astype(narrow))
        return held if narrow is None else self.node("Cast", [held], f"{name}/weight_codes", "Cast_weight", to=INT8)

    def _layer_operator(
        self,
        step: Step,
        given: list[str],
        scale: Scale,
        out: Scale | None,
        grid: Codes | None,
        output: str,
        geometry: dict[str, Any],
        read: Codes,
        constants: Folded,
    ) -> str:
        x, weight, steps, zeros, bias = given
        operands = [x, scale.step, scale.zero, weight, steps, zeros]
        if geometry is ROWS:
            ends = [] if out is None else [out.step, out.zero]
            operator, operands = "QGemm", [*operands, bias, *ends]
        elif out is not None:
            operator, operands = "QLinearConv", [*operands, out.step, out.zero, bias]
        else:
            return self._real_sums(step, x, weight, scale, output, geometry, read, constants)
        if out is None or grid is None:
            return self.node(operator, operands, output, **geometry)
        clipped = self._clip_nodes(grid, out)
        raw = self.node(operator, operands, f"{output}/raw" if clipped else output, **geometry)
        return self._within(raw, clipped, output)

    def _real_sums(
        self,
        step: Step,
        x: str,
        weight: str,
        scale: Scale,
        output: str,
        geometry: dict[str, Any],
        read: Codes,
        constants: Folded,
    ) -> str:
        """Write a last convolution: ``fl32(fl32(acc + b) fl32(s_x s_w))``."""
        name, graph = step.name, self.graph
        shape = [-1] + [1] * (constants.codes.dim() - 2)
        bias = graph.constant(f"{name}.shaped_bias", array(constants.bias).astype(np.int32).reshape(shape))
        factor = read.step * constants.step
        scales = graph.constant(f"{name}.scale", array(factor).reshape(shape))
        sums = self.node("ConvInteger", [x, weight, scale.zero], f"{name}/sums", **geometry)
        total = self.node("Add", [sums, bias], f"{name}/total", "Add_bias")
        real = self.node("Cast", [total], f"{name}/float", to=FLOAT)
        return self.node("Mul", [real, scales], output)

    def _read(self, step: Step, x: str) -> tuple[str, Scale]:
        """Return the codes that a layer multiplies, and their scale; fewer than those of its input by (M17)."""
        source = self.scale(step.node.inputs[0])
        layer = step.module
        if layer.stored_quantizer is None:
            return x, source
        grid, name = self.run.read_grid(step), layer.input_quantizer.name
        if self.container == SYMMETRIC:
            real = self._real(x, source, f"{step.name}/stored", "Dequantize_stored")
            scale = self._scale(grid, name)
            return self._codes(real, scale, grid, f"{step.name}/codes", "Quantize_input"), scale
        codes, most = f"{step.name}/codes", int(self.run.constants[step].codes.abs().max())
        only_above = self.run.grid(step.node.inputs[0]).low >= 0 and most <= MOST_FOR_ANY_ZERO
        scale = self._saturating(grid, name) if only_above else self._scale(grid, name)
        clipped = [] if only_above else self._clip_nodes(grid, scale)
        raw = f"{codes}/raw" if clipped else codes
        if self.form == "qdq":  # the function is the identity, and what makes runtimes requantize by one table
            real = self._real(x, source, f"{step.name}/stored", "Dequantize_stored")
            same = self.node("LeakyRelu", [real], f"{step.name}/requantized", "Requantize", alpha=1.0)
            self.node("QuantizeLinear", [same, scale.step, scale.zero], raw, "Quantize_input")
        else:
            operands = [x, source.step, source.zero, scale.step, scale.zero]
            self.node("QLinearLeakyRelu", operands, raw, "Requantize", alpha=1.0)
        return self._within(raw, clipped, codes, "_input"), scale

    def add(self, step: Step, inputs: list[str], output: str) -> str:
        ratio = float(self.run.step_of(step.node.inputs[0]) / self.run.step_of(step.end))
        if ratio > MOST_ADDED:
            raise UsageError(
                f"{step.name}: the step of its operands is {ratio:.3g} times that of their sum, and ONNX Runtime's "
                f"addition is exact to {MOST_ADDED:.0f}; has the step collapsed? lsquant.check says so"
            )
        return self._of_two("Add", step, inputs, output)

    def multiply(self, step: Step, inputs: list[str], output: str) -> str:
        return self._of_two("Mul", step, inputs, output)

    def _of_two(self, kind: str, step: Step, inputs: list[str], output: str) -> str:
        """Write an addition or a product."""
        a, b = (self.scale(source) for source in step.node.inputs)
        out, grid = self.scale(step.end), self.run.limited(step)
        if self.form == "qdq":
            reals = [self._real(x, s, f"{step.name}/{n}", n) for x, s, n in zip(inputs, (a, b), "ab", strict=True)]
            return self._codes(self.node(kind, reals, f"{step.name}/{kind}"), out, grid, output)
        operands = [inputs[0], a.step, a.zero, inputs[1], b.step, b.zero, out.step, out.zero]
        clipped = self._clip_nodes(grid, out)
        raw = self.node(f"QLinear{kind}", operands, f"{output}/raw" if clipped else output)
        return self._within(raw, clipped, output)

    def average(self, step: Step, inputs: list[str], output: str) -> str:
        source, out, grid = self.scale(step.node.inputs[0]), self.scale(step.end), self.run.limited(step)
        x = self.run.stored[step.node.inputs[0]]
        if is_windowed(step.module):
            return self._windows(step, inputs[0], output)
        dims, keep = averaged(step.module, x)
        if sorted(d % x.dim() for d in dims) != list(range(2, x.dim())):
            raise UsageError(f"{step.name}: a mean over {dims} has no integer form in ONNX; average over all of space")
        ratio = float(self.run.grid(step.node.inputs[0]).step / (self.run.grid(step.end).step * x[0, 0].numel()))
        if not MOST_SCALED[0] <= ratio < MOST_SCALED[1]:
            raise UsageError(
                f"{step.name}: the step of its output is {1 / ratio:.3g} times that of a sum of its input, and ONNX "
                f"Runtime takes more than 1/{MOST_SCALED[1]:.0f}; has the step collapsed? lsquant.check says so"
            )
        result = output if keep else f"{output}/kept"
        if self.form == "qdq":
            real = self._real(inputs[0], source, f"{step.name}/input")
            y = self._codes(self.node("GlobalAveragePool", [real], f"{step.name}/mean"), out, grid, result)
        else:
            clipped = self._clip_nodes(grid, out)
            operands = [inputs[0], source.step, source.zero, out.step, out.zero]
            y = self.node("QLinearGlobalAveragePool", operands, f"{result}/raw" if clipped else result, channels_last=0)
            y = self._within(y, clipped, result)
        return y if keep else self._moved("Flatten", [y], output, step.end, axis=1)

    def _windows(self, step: Step, x: str, output: str) -> str:
        """Write an average over windows as a layer whose weights are 1."""
        pool, source = step.module, step.node.inputs[0]
        if self.run.stored[source].dim() != pool.dims + 2:
            raise UsageError(f"{step.name}: {type(pool).__name__} of an input without a batch has no integer form")
        kernel, stride, padding = window_geometry(pool)
        channels = self.run.stored[source].shape[1]
        ones = torch.ones(channels, 1, *kernel)
        constants = Folded(
            ones, torch.ones(channels) / window_size(pool), torch.zeros(channels, dtype=torch.float64), 0
        )
        sides = [(side, side) for side in padding]
        geometry = _attributes(kernel, stride, sides, [1] * pool.dims, channels)
        return self._products(step, x, self.scale(source), self.run.grid(source), constants, geometry, output)

    def cat(self, step: Step, inputs: list[str], output: str) -> str:
        return self._moved("Concat", inputs, output, step.end, axis=step.module.dim)

    def function(self, step: Step, inputs: list[str], output: str) -> str:
        """Write a function as the runtime's own, of whose errors nothing comes near a tie; else as a table."""
        module, grid = step.module, self.run.grid(step.end)
        source, out = self.scale(step.node.inputs[0]), self.scale(step.end)
        read = self.run.grid(step.node.inputs[0])
        every = all_codes(read.low, read.high, read.step.device)
        if not is_safe(module, every, (grid.low, grid.high), read.step.detach(), grid.step.detach()):
            return self._table(step, inputs, output)
        if has_gate(module):
            return self._silu(step, inputs[0], output)
        operator, error, attributes = _FUNCTIONS.get(module.float_type, lambda m: ("", np.inf, {}))(module)
        if operator == "Silu":
            error *= float(every.abs().max() * read.step)
        if not operator or error > FUNCTION_MARGIN * float(grid.step):
            return self._table(step, inputs, output)
        quantized = {"Sigmoid": "QLinearSigmoid", "LeakyRelu": "QLinearLeakyRelu"}.get(operator)
        if self.form == "qdq" or quantized is None:
            real = self._real(inputs[0], source, f"{step.name}/input")
            return self._codes(self._real_function(step, operator, real, attributes), out, grid, output)
        clipped = self._clip_nodes(grid, out)
        operands = [inputs[0], source.step, source.zero, out.step, out.zero]
        raw = self.node(quantized, operands, f"{output}/raw" if clipped else output, **attributes)
        return self._within(raw, clipped, output)

    def _real_function(self, step: Step, operator: str, x: str, attributes: dict[str, Any]) -> str:
        """Write a function in floating point."""
        name = step.name
        if operator == "Silu":
            share = self.node("Sigmoid", [x], f"{name}/sigmoid")
            return self.node("Mul", [x, share], f"{name}/real")
        if operator != "Erf":
            return self.node(operator, [x], f"{name}/real", **attributes)
        root, one, half = (self.graph.constant(f"float_{v:.4g}", np.float32(v)) for v in (2**0.5, 1.0, 0.5))
        scaled = self.node("Div", [x, root], f"{name}/scaled")
        erf = self.node("Erf", [scaled], f"{name}/erf")
        share = self.node("Add", [erf, one], f"{name}/share")
        product = self.node("Mul", [x, share], f"{name}/product", "Mul_input")
        return self.node("Mul", [product, half], f"{name}/real", "Mul_half")

    def _silu(self, step: Step, x: str, output: str) -> str:
        """Write ``x sigmoid(x)``, the sigmoid in codes of 8 bits."""
        name, grid = step.name, self.run.grid(step.end)
        source, out = self.scale(step.node.inputs[0]), self.scale(step.end)
        held = self.graph.constant("gate_step", np.float32(GATE_STEP))
        gate = self._held(held, signed=False)
        if self.form == "qdq":
            real = self._real(x, source, f"{name}/gate_input", "Dequantize_gate_input")
            share = self.node("Sigmoid", [real], f"{name}/sigmoid")
            q = self.node("QuantizeLinear", [share, gate.step, gate.zero], f"{name}/gate", "Quantize_gate")
            operands = [self._real(x, source, f"{name}/input", "Dequantize_input")]
            operands.append(self._real(q, gate, f"{name}/share", "Dequantize_gate"))
            return self._codes(self.node("Mul", operands, f"{name}/product"), out, grid, output)
        operands = [x, source.step, source.zero, gate.step, gate.zero]
        q = self.node("QLinearSigmoid", operands, f"{name}/gate")
        clipped = self._clip_nodes(grid, out)
        operands = [x, source.step, source.zero, q, gate.step, gate.zero, out.step, out.zero]
        raw = self.node("QLinearMul", operands, f"{output}/raw" if clipped else output)
        return self._within(raw, clipped, output)

    def _table(self, step: Step, inputs: list[str], output: str) -> str:
        source, out = self.scale(step.node.inputs[0]), self.scale(step.end)
        read, grid = self.run.grid(step.node.inputs[0]), self.run.grid(step.end)
        every = all_codes(read.low, read.high, read.step.device)
        values = function_quotients(step.module, every, read.step.detach(), grid.step.detach())
        codes = array(torch.round(values).clamp(grid.low, grid.high)).astype(np.int64)
        name = f"{step.name}.table"
        if self.container == SYMMETRIC:
            reals = codes.astype(np.float32) * self.graph.constants[out.step]
            found = self._looked_up(step, inputs[0], source, read.low, self.graph.constant(name, reals))
            return self.node("QuantizeLinear", [found, out.step, out.zero], output)
        table = np.zeros(256, out.container)
        # an index below 0 counts from the end
        table[np.arange(read.low, read.high + 1) + source.shift] = (codes + out.shift).astype(out.container)
        held = self.graph.constant(name, table)
        index = self.node("Cast", inputs, f"{step.name}/index", to=INT32)
        return self.node("Gather", [held, index], output, axis=0)

    def _looked_up(self, step: Step, x: str, source: Scale, low: int, table: str) -> str:
        """Write a table of real values whose index is made in floating point, from real values."""
        name = step.name
        real = self._real(x, source, f"{name}/input")
        quotient = self.node("Div", [real, source.step], f"{name}/quotient")
        first = self.graph.constant(f"float_{low}", np.float32(low))
        place = self.node("Sub", [self.node("Round", [quotient], f"{name}/whole"), first], f"{name}/place")
        index = self.node("Cast", [place], f"{name}/index", to=INT32)
        return self.node("Gather", [table, index], f"{name}/real", axis=0)

    def move(self, step: Step, inputs: list[str], output: str) -> str:
        module, graph = step.module, self.graph
        if module is None or (isinstance(module, lnn.Slice) and all(isinstance(p, slice) for p in module.index)):
            edges = self._edges(step)
            if not edges:
                return self._moved("Identity", inputs, output, step.end)
            return self._slice(step, inputs[0], edges, output)
        if isinstance(module, nn.Flatten) and module.end_dim == -1 and module.start_dim == 1:
            return self._moved("Flatten", inputs, output, step.end, axis=1)
        if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
            n = self.run.stored[step.end].dim() - 2
            kernel, stride, padding, dilation = (
                sizes_of(v, n) or () for v in (module.kernel_size, module.stride, module.padding, module.dilation)
            )
            return self._moved(
                "MaxPool", inputs, output, step.end, kernel_shape=kernel, strides=stride, pads=[*padding, *padding],
                dilations=dilation, ceil_mode=int(module.ceil_mode),
            )  # fmt: skip
        if isinstance(module, nn.PixelShuffle):
            factor = module.upscale_factor
            return self._moved("DepthToSpace", inputs, output, step.end, blocksize=factor, mode="CRD")
        if isinstance(module, nn.Upsample):
            source, target = (self.run.stored[node].shape for node in (step.node.inputs[0], step.end))
            factors = [1.0, 1.0, *(b / a for a, b in zip(source[2:], target[2:], strict=True))]
            if any(factor != int(factor) for factor in factors):
                raise UsageError(f"{step.name}: upsampling by {factors[2:]} has no integer form; use whole factors")
            scales = graph.constant(f"{step.name}.scales", np.array(factors, np.float32))
            return self._moved(
                "Resize", [*inputs, "", scales], output, step.end, mode="nearest", nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            )  # fmt: skip
        if hasattr(module, "padding") and type(module).__name__.endswith(("Pad1d", "Pad2d", "Pad3d")):
            dims, padding = self.run.stored[step.end].dim(), vars(module)["padding"]
            pairs = list(padding)
            last = [(pairs[i], pairs[i + 1]) for i in reversed(range(0, len(pairs), 2))]
            sides = [(0, 0)] * (dims - len(last)) + last
            ends = np.array([before for before, _ in sides] + [after for _, after in sides], np.int64)
            pads = graph.constant(f"{step.name}.pads", ends)
            zero = self.scale(step.end).zero
            value = graph.constant("float_0", np.float32(0)) if self.container == SYMMETRIC else zero
            return self._moved("Pad", [*inputs, pads, value], output, step.end)
        raise UsageError(f"{step.name}: {type(module).__name__} has no integer form in ONNX yet")

    def _edges(self, step: Step) -> list[tuple[int, int, int, int]]:
        """Return (axis, start, end, step) of a slice, or of one part of what Chunk or Split cuts."""
        source = step.node.inputs[0]
        index: Any = step.module.index if step.module is not None else step.node.call.args[1]
        if isinstance(index, int) and gives_parts(source):
            cutter: Any = source.module
            parts, axis = self.run.stored[source], cutter.dim % self.run.stored[step.end].dim()
            if axis == 0:
                raise UsageError(f"{source.name}: parts of the batch have no integer form in ONNX")
            sizes = [part.shape[axis] for part in parts]
            index %= len(sizes)
            return [(axis, sum(sizes[:index]), sum(sizes[: index + 1]), 1)]
        index = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, slice) for part in index):
            raise UsageError(f"{step.name}: the index {index} has no integer form in ONNX; use lsquant.nn.Slice")
        slices: Any = [(d, part) for d, part in enumerate(index) if part != slice(None)]
        return [(d, p.start or 0, END if p.stop is None else p.stop, p.step or 1) for d, p in slices]


def _geometry(layer: Any, sides: list[tuple[int, int]]) -> dict[str, Any]:
    """Return the attributes of a convolution."""
    return _attributes(list(layer.kernel_size), list(layer.stride), sides, list(layer.dilation), layer.groups)


def _attributes(
    kernel: list[int], stride: list[int], sides: list[tuple[int, int]], dilation: list[int], groups: int
) -> dict[str, Any]:
    before, after = zip(*sides, strict=True)
    return {
        "kernel_shape": kernel, "strides": stride, "pads": [*before, *after], "dilations": dilation, "group": groups,
    }  # fmt: skip


_LOWER = {
    Kind.QUANTIZE: Writer.quantize,
    Kind.LAYER: Writer.layer,
    Kind.ADD: Writer.add,
    Kind.MULTIPLY: Writer.multiply,
    Kind.CAT: Writer.cat,
    Kind.AVERAGE: Writer.average,
    Kind.FUNCTION: Writer.function,
    Kind.MOVE: Writer.move,
}


def integer_proto(
    network: FusedNetwork, example_inputs: Any, form: str, opset: int | None, dynamic_batch: bool
) -> tuple[Any, Writer, int | None]:
    """Return (ModelProto, what wrote it, operator set) of a fused network, its marked nodes lowered.

    opset: None: the lowest one that serves, with INT4 where weights have at most 4 bits.
    The writer has a trace for each step over codes, of a stored tensor under the name of its tap.

    A network without floating-point steps is its program, which is written; else torch's exporter follows the model,
    and its marked nodes are lowered.
    """
    args, kwargs = model_inputs(example_inputs)
    run = network.run()
    given = network.given(args, kwargs)
    for step in network.program.steps:
        x = given.get(step.node)
        if step.kind is Kind.QUANTIZE and isinstance(x, Tensor) and x.dtype != torch.float32:
            raise UsageError(f"export_onnx: example_inputs of type {x.dtype}; give float32, and a float32 model")
    with torch.no_grad():
        run.outputs(given)
    container = network.joins.container
    if container == SYMMETRIC and form != "qdq":
        raise UsageError(
            f"export_onnx: form={form!r} is no form of target='tensorrt', which reads QuantizeLinear and "
            "DequantizeLinear; use form='qdq'"
        )
    writer = Writer(Graph(), run, form, opset or INT4_SINCE, container)
    proto = _whole_graph(network, writer, args, kwargs, max(opset or 0, TORCH_OPSET), dynamic_batch)
    if proto is None:
        proto = exported(MarkedNetwork(network, run), example_inputs, opset or TORCH_OPSET, dynamic_batch)
        _lower_marked(proto, writer)
    return proto, writer, opset or (INT4_SINCE if writer.has_narrow else None)


def _lower_marked(proto: Any, writer: Writer) -> None:
    """Put what the writer writes in the place of marked nodes."""
    graph, renamed = writer.graph, {}
    for node in proto.graph.node:
        inputs = [renamed.get(name, name) for name in node.input]
        if node.domain != "lsquant":
            del node.input[:]
            node.input.extend(inputs)
            graph.nodes.append(node)
            continue
        name = next(a.s.decode() for a in node.attribute if a.name == "layer")
        renamed[node.output[0]] = writer.lower(node.op_type, name, inputs)
    for value in proto.graph.output:
        value.name = renamed.get(value.name, value.name)
    numpy_helper = require("onnx", extra="onnx").numpy_helper
    writer.finish()
    used = {name for node in graph.nodes for name in node.input} | {v.name for v in proto.graph.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    kept += [numpy_helper.from_array(value, name) for name, value in graph.constants.items()]
    for part, new in ((proto.graph.node, graph.nodes), (proto.graph.initializer, kept)):
        del part[:]
        part.extend(new)


def _whole_graph(
    network: FusedNetwork, writer: Writer, args: Any, kwargs: Any, opset: int, dynamic_batch: bool
) -> Any | None:
    """Return the ModelProto of a network without floating-point steps; None where torch's exporter is needed."""
    given, run, program = network.given(args, kwargs), writer.run, network.program
    plain = all(isinstance(x, Tensor) and x.dtype == torch.float32 and x.dim() > 1 for x in given.values())
    batches = {x.shape[0] for x in given.values() if isinstance(x, Tensor) and x.dim()}
    if program.floats or not plain or len(batches) != 1:
        return None
    require_single(run)
    helper, numpy_helper = (require(f"onnx.{part}", extra="onnx") for part in ("helper", "numpy_helper"))

    def value(name: str, shape: torch.Size) -> Any:
        sizes = ["batch", *shape[1:]] if dynamic_batch else list(shape)
        return helper.make_tensor_value_info(name, FLOAT, sizes)

    names: dict[Node, str] = {node: str(node.call.target) for node in given}
    inputs = [value(names[node], x.shape) for node, x in given.items()]
    codes: dict[Node, str] = {}
    for step in program.steps:
        quantizes = step.kind is Kind.QUANTIZE
        sources = [names[step.node]] if quantizes else [codes[source] for source in step.node.inputs]
        made = codes if program.stored[step.end] is not None else names
        made[step.end] = writer.step(step, sources)
    outputs = []
    for node in output_nodes(program.flow):
        if node not in names:
            names[node] = writer.lower("Real", node.name, [codes[node]])
        outputs.append(value(names[node], run.real_of(node).shape))
    writer.finish()
    constants = [numpy_helper.from_array(held, name) for name, held in writer.graph.constants.items()]
    graph = helper.make_graph(writer.graph.nodes, "lsquant", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
