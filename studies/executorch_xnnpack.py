"""A verdict for ExecuTorch's XNNPACK delegate on integer-only networks: do its codes differ from those of the network?

    python studies/executorch_xnnpack.py [NETWORK ...] [--bits w8a8 w4a8] [--images N] [--operators | --time]

A fused network of target "xnnpack" is written as an ordinary module in the pattern that XnnpackPartitioner recognises:
dequantize, a float operator, quantize, with int8 codes and a step for each channel of a weight.  ExecuTorch runs
it, and its outputs and codes are compared with those of the fused network, in four forms:

- as usual;
- step by step: every step is given the exact codes of what it reads, so that a difference is its own;
- in the exact form (class Written), which avoids what XNNPACK rounds otherwise;
- in that form with all stored tensors as further outputs, end to end.

Networks have random weights and are calibrated on random inputs; BatchNorm has random statistics.  Run it in an
environment of its own, in which executorch is installed beside lsquant.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
from lsquant import reference_integer as reference
from lsquant.dataflow import Node
from lsquant.fusion.arithmetic import EXACT_IN_FLOAT32
from lsquant.fusion.network import FusedNetwork, Run, averaged, limits_of
from lsquant.nn.pool import is_windowed, window_geometry
from lsquant.program import Kind, Step
from lsquant.verification.verdict import Differences

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

Q: Any = torch.ops.quantized_decomposed
LOWEST, HIGHEST, SHIFT = -128, 127, 128
INT8 = (LOWEST, HIGHEST, torch.int8)
"""The last arguments of quantize and dequantize."""
BATCH, OPERATORS = 8, 16
MOST_BIAS = 2**21
"""Below it ``rint(fl(fl(b s) fl(1 / s)))``, by which the delegate makes an int32 of the bias, is b."""


# ---- networks ----


class Small(nn.Module):
    """A residual network with max pooling, a concatenation and a signed average."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.a_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.b_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c, self.c_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide, self.wide_norm = nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.hidden, self.head = nn.Linear(32, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        x = F.relu(self.b_norm(self.b(F.relu(self.a_norm(self.a(x))))) + x)
        x = torch.cat([x, F.relu(self.c_norm(self.c(x)))], 1)
        x = self.wide_norm(self.wide(x)).mean((2, 3))
        return self.head(F.relu(self.hidden(x)))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, as in MobileNetV2, with ReLU6, strides, additions and a mean of 7 x 7."""

    def __init__(self) -> None:
        super().__init__()
        from networks import Inverted, unit

        blocks = [Inverted(16, 16, 1, 4), Inverted(16, 24, 2, 4), Inverted(24, 24, 1, 4), Inverted(24, 32, 2, 4)]
        self.features = nn.Sequential(unit(3, 16, 3, 2, nn.ReLU6()), *blocks, unit(32, 128, 1, 1, nn.ReLU6()))
        self.average, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.flatten(self.average(self.features(x)), 1))


def resnet20() -> nn.Module:
    from networks import cifar_resnet

    return cifar_resnet("resnet20")


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "small": (Small, 32), "resnet20": (resnet20, 32), "separable": (Separable, 56),
}  # fmt: skip
"""Name -> how to make a network, height and width of its input."""


def with_random_norms(model: nn.Module) -> nn.Module:
    """Give BatchNorm statistics and factors, every eighth of which is negative."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            for held, values in (
                (module.running_mean, 0.1 * torch.randn(n)),
                (module.running_var, 0.5 + torch.rand(n)),
                (module.bias, 0.2 * torch.randn(n)),
                (module.weight, (0.5 + torch.rand(n)) * torch.where(torch.rand(n) < 1 / 8, -1.0, 1.0)),
            ):
                held.data.copy_(values)
    return model.eval()


def fused(model: nn.Module, bits: str, batches: list[Tensor]) -> FusedNetwork:
    """Prepare, calibrate and fuse, for target "xnnpack"."""
    lsquant.trace(model, batches[0])
    recipe = lsquant.Recipe.preset(bits, integer_only=True, target="xnnpack")
    lsquant.prepare(model, recipe, example_inputs=batches[0])
    lsquant.calibrate(model, batches)
    return lsquant.fuse(model.eval()).eval()


# ---- as a module of torch operators ----


class Written(nn.Module):
    """A fused network in the pattern of quantize and dequantize.

    by_step: every step reads codes that are given, not those of the step before.
    show: return the codes of all stored tensors behind the outputs.
    exact: write what XNNPACK rounds otherwise in another way.  The input is divided by its step and quantized with a
        step of 1, for XNNPACK multiplies by the inverse; weights that read it have the step in theirs.  An average is
        a depthwise layer of weights 1, whose factor XNNPACK makes as that of a layer.
    """

    def __init__(
        self, network: FusedNetwork, x: Tensor, by_step: bool = False, show: bool = False, exact: bool = False
    ) -> None:
        super().__init__()
        run = network.run()
        with torch.no_grad():
            run.outputs(network.given((x,), {}))
        self.by_step, self.show, self.exact = by_step, show, exact
        self.steps, self.nodes = run.program.steps, network.program.flow.nodes
        self.stored = {s.end: s for s in self.steps if run.program.stored[s.end] is not None}
        self.scales = {node: scale_of(run, node) for node in self.stored}
        self.divided = self._divided(run) if exact else {}
        self.scales |= {node: (1.0, self.scales[node][1]) for node in self.divided}
        self.kept: list[str] = []
        self.limits = {s: limits_of(s.limit) for s in self.steps if s.limit is not None}
        averages = [s for s in self.steps if s.kind is Kind.AVERAGE and not is_windowed(s.module)]
        self.sizes = {s: averaged(s.module, run.stored[s.node.inputs[0]]) for s in averages}
        self.clipped = 0
        for i, step in enumerate(self.steps):
            if step.kind is Kind.FLOAT:
                raise NotImplementedError(f"{step.name}: floating point")
            if step.kind is Kind.LAYER:
                self._hold(i, step, run)
            elif step.kind is Kind.AVERAGE and (exact or is_windowed(step.module)):
                self._hold_window(i, step, run)

    def _hold(self, i: int, step: Step, run: Run) -> None:
        layer = step.module
        if layer.stored_quantizer is not None:
            raise NotImplementedError(f"{step.name}: reads fewer bits than are stored")
        constants = run.constants[step].positive()  # XNNPACK wants positive scales
        self.clipped += constants.clipped
        scale = run.read_grid(step).step.detach() * constants.step
        if float(constants.bias.abs().max()) >= MOST_BIAS:
            raise NotImplementedError(f"{step.name}: bias of {MOST_BIAS} and more")
        held = {"weight": constants.codes.to(torch.int8)}
        if step.end in self.stored:
            steps = scale if step.node.inputs[0] in self.divided else constants.step
            held |= {"step": steps, "bias": constants.bias.float() * scale}
            held["zeros"] = torch.zeros(len(constants.step), dtype=torch.int64)
        else:  # sums of whole numbers, exact in float32
            rows, grid = constants.codes.abs().flatten(1).sum(1), run.read_grid(step)
            largest = rows * max(abs(grid.low), abs(grid.high)) + constants.bias.abs()
            if float(largest.max()) >= EXACT_IN_FLOAT32 or step.limit is not None:
                raise NotImplementedError(f"{step.name}: sums of 2^24 and more, or a limit behind a last layer")
            held = {"weight": constants.codes, "bias": constants.bias.float(), "scale": scale}
        for name, value in held.items():
            self.register_buffer(f"{name}{i}", value.detach().clone())

    def _hold_window(self, i: int, step: Step, run: Run) -> None:
        """Hold the weights 1 of an average, and the step with which their factor is that of the average."""
        source = step.node.inputs[0]
        x = run.stored[source]
        kernel = window_geometry(step.module)[0] if is_windowed(step.module) else x.shape[2:]
        s, s_y, count = run.step_of(source), run.step_of(step.end), math.prod(kernel)
        usual = s * (torch.ones_like(s) / count) / s_y  # of windows
        found = step_for(usual if is_windowed(step.module) else s / (s_y * count), s, s_y)
        if found is None or source in self.divided:
            self.kept.append(step.name)
            return
        channels = x.shape[1]
        self.register_buffer(f"weight{i}", torch.ones(channels, 1, *kernel, dtype=torch.int8))
        self.register_buffer(f"step{i}", found.expand(channels).clone())
        self.register_buffer(f"zeros{i}", torch.zeros(channels, dtype=torch.int64))
        self.register_buffer(f"bias{i}", torch.zeros(channels))

    def _divided(self, run: Run) -> dict[Node, Tensor]:
        """Return node -> step, of the tensors that share the input's step, where only layers compute with them."""
        stored = run.program.stored
        of_input = {stored[s.end] for s in self.steps if s.kind is Kind.QUANTIZE}
        found = {node: run.step_of(node) for node in self.stored if stored[node] in of_input}
        moves = Kind.QUANTIZE, Kind.MOVE, Kind.CAT
        made = all(self.stored[node].kind in moves for node in found)
        read = all(s.kind in (*moves, Kind.LAYER) for s in self.steps if set(s.node.inputs) & set(found))
        return found if made and read else {}

    def forward(self, x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        codes: dict[Node, Tensor] = {}
        reads = dict(zip(self.stored, given, strict=True)) if self.by_step else codes
        real: dict[Node, Tensor] = {}
        for i, step in enumerate(self.steps):
            if step.kind is Kind.QUANTIZE:
                value = x / float(self.divided[step.end]) if step.end in self.divided else x
                codes[step.end] = Q.quantize_per_tensor(value, *self.scales[step.end], *INT8)
            elif step.end not in self.stored:
                real[step.end] = self._last(i, step, reads[step.node.inputs[0]])
            else:
                codes[step.end] = self._codes(i, step, [reads[node] for node in step.node.inputs])
        end = next(node for node in reversed(self.nodes) if node.kind == "output")
        outputs = (real[self._flow_of(end)],)
        return (*outputs, *codes.values()) if self.show or self.by_step else outputs

    def _flow_of(self, end: Node) -> Node:
        (found,) = [s.end for s in self.steps if s.end.call is end.call.args[0]]
        return found

    def _codes(self, i: int, step: Step, reads: list[Tensor]) -> Tensor:
        module, scale = step.module, self.scales[step.end]
        if step.kind is Kind.MOVE and not isinstance(module, (nn.MaxPool2d, nn.Flatten)):
            return moved(step, reads[0], scale[1])
        pairs = zip(step.node.inputs, reads, strict=True)
        values = [Q.dequantize_per_tensor(q, *self.scales[node], *INT8) for node, q in pairs]
        y = self._real(i, step, values)
        if step in self.limits:
            low, high = self.limits[step]
            y = F.relu(y) if high is None else F.hardtanh(y, low, high)
        q = Q.quantize_per_tensor(y, *scale, *INT8)
        if step.kind is Kind.AVERAGE and not is_windowed(module) and not self.sizes[step][1]:
            q = Q.quantize_per_tensor(Q.dequantize_per_tensor(q, *scale, *INT8).flatten(1), *scale, *INT8)
        return q

    def _real(self, i: int, step: Step, values: list[Tensor]) -> Tensor:
        module, x = step.module, values[0]
        if hasattr(self, f"weight{i}"):
            weight = [getattr(self, f"{name}{i}") for name in ("weight", "step", "zeros")]
            return product(module, x, Q.dequantize_per_channel(*weight, 0, *INT8), getattr(self, f"bias{i}"))
        if step.kind is Kind.ADD:
            return values[0] + values[1]
        if step.kind is Kind.MULTIPLY:
            return values[0] * values[1]
        if step.kind is Kind.CAT:
            return torch.cat(values, module.dim)
        if step.kind is Kind.MOVE:
            return module(x)
        if step.kind is Kind.AVERAGE and not is_windowed(module):
            return x.mean(self.sizes[step][0], keepdim=True)
        raise NotImplementedError(f"{step.name}: {step.kind}")

    def _last(self, i: int, step: Step, codes: Tensor) -> Tensor:
        """Return real values: a layer over whole float32 numbers, whose sums are exact, and one multiplication."""
        x = codes.to(torch.float32) - float(self.scales[step.node.inputs[0]][1])
        weight, bias, scale = (getattr(self, f"{name}{i}") for name in ("weight", "bias", "scale"))
        y = product(step.module, x, weight, bias)
        return y * scale.reshape(-1, *[1] * (y.dim() - 2))


def scale_of(run: Run, node: Node) -> tuple[float, int]:
    """Return (step, zero point) of a stored tensor, whose codes fill int8."""
    grid = run.grid(node)
    if grid.high - grid.low != HIGHEST - LOWEST:
        raise NotImplementedError(f"{node.name}: codes from {grid.low} to {grid.high} are no 8 bits")
    return float(grid.step), LOWEST - grid.low


def step_for(factor: Tensor, s: Tensor, s_y: Tensor) -> Tensor | None:
    """Return a float32 w with ``fl(fl(s w) / s_y) = factor``; None where none is."""
    w = factor * s_y / s
    for end in (0.0, math.inf):
        near = w.clone()
        for _ in range(4):
            if bool(s * near / s_y == factor):
                return near
            near = torch.nextafter(near, torch.full_like(near, end))
    return None


def product(layer: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the product of a layer, or of an average, with a weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if is_windowed(layer):
        _, stride, padding = window_geometry(layer)
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))
    if not isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, groups=len(weight))
    sides = layer.padding_sides()
    if any(before != after for before, after in sides):
        raise NotImplementedError("padding of sides that differ")
    return F.conv2d(x, weight, bias, layer.stride, [side for side, _ in sides], layer.dilation, layer.groups)


def moved(step: Step, codes: Tensor, zero: int) -> Tensor:
    """Return codes that were moved: a slice, or padded with the code of 0."""
    if isinstance(step.module, (nn.ZeroPad2d, nn.ConstantPad3d)):
        return F.pad(codes, list(step.module.padding), value=zero)
    result: Tensor = step.module(codes)
    return result


# ---- ExecuTorch ----


class Program:
    """A module as ExecuTorch runs it.

    delegates: of each, what it computes: operator and the type of its output -> how often.
    outside: operators that are left to portable kernels -> how often.
    """

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...]) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

        with torch.no_grad():
            exported = torch.export.export(model, example, strict=False)
        self.delegates: list[Counter[str]] = []
        with seen_graphs(self.delegates):
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        calls = [n for n in edge.exported_program().graph.nodes if n.op == "call_function"]
        names = [getattr(n.target, "__name__", str(n.target)) for n in calls]
        self.outside = Counter(name for name in names if name not in ("getitem", "executorch_call_delegate"))
        self.data = edge.to_executorch().buffer
        self._program = Runtime.get().load_program(self.data)
        self._method = self._program.load_method("forward")  # does not hold its program

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        return [y.clone() for y in self._method.execute(list(inputs))]


@contextlib.contextmanager
def seen_graphs(delegates: list[Counter[str]]) -> Iterator[None]:
    """Note what every delegate computes, as it is handed to XNNPACK: operator, type of its output -> how often."""
    from executorch.backends.xnnpack import xnnpack_preprocess

    serialize = xnnpack_preprocess.serialize_xnnpack_binary

    def noted(graph: Any, data: Any) -> bytes:
        types = {}
        for value in graph.xvalues:
            held = value.xvalue_union
            held = getattr(held, "tensor_value", held)
            types[held.id_out] = held.datatype.name.removeprefix("xnn_datatype_")
        nodes = [node.xnode_union for node in graph.xnodes]
        delegates.append(Counter(f"{type(node).__name__} {types[node.output_id]}" for node in nodes))
        return serialize(graph, data)

    with mock.patch.object(xnnpack_preprocess, "serialize_xnnpack_binary", noted):
        yield


# ---- comparison ----


def kind_of(step: Step) -> str:
    """Return the name under which differences of a step are counted."""
    module = step.module
    if step.kind is Kind.MOVE:
        return type(module).__name__
    if step.kind is not Kind.LAYER:
        return step.kind.value
    if isinstance(module, nn.Linear):
        return "linear"
    return "depthwise" if module.groups > 1 else "convolution"


def compared(network: FusedNetwork, batches: list[Tensor]) -> None:
    """Print how outputs and codes of the three forms differ."""
    written = {
        "as usual": Written(network, batches[0]),
        "step by step": Written(network, batches[0], by_step=True),
        "exact form": Written(network, batches[0], exact=True),
        "exact form, shown": Written(network, batches[0], exact=True, show=True),
    }
    plain, exact = written["as usual"], written["exact form"]
    nodes = list(plain.stored)
    print(f"  {plain.clipped} codes -128 of channels with a negative step are 127")
    print(f"  exact form: input {'divided' if exact.divided else 'as usual'}; averages as usual: {exact.kept}")

    def expected(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = network.codes(x)
        held = [found[node.name] + plain.scales[node][1] for node in nodes]
        with torch.no_grad():
            return network(x), [q.to(torch.int8) for q in held]

    y, held = expected(batches[0])
    examples = {name: (batches[0], *held) if form.by_step else (batches[0],) for name, form in written.items()}
    programs = {name: Program(written[name].eval(), examples[name]) for name in written}
    for name, program in programs.items():
        total = sum(program.delegates, Counter[str]())
        print(f"  {name}: {len(program.delegates)} delegates: {listed(total)}; outside: {listed(program.outside)}")
    outputs = {name: Differences("outputs", name) for name in programs}
    codes = {name: Differences("codes", name) for name, form in written.items() if form.by_step or form.show}
    for x in batches:
        y, held = expected(x)
        for name, program in programs.items():
            got, *shown = program(x, *held) if written[name].by_step else program(x)
            outputs[name].add("output", got.numpy(), y.numpy())
            for node, one, other in zip(nodes, shown, held, strict=True) if shown else ():
                codes[name].add(node.name, one.numpy(), other.numpy())
    for name, differences in outputs.items():
        print(f"  outputs, {name}: {fraction(differences.parts.values())}")
    for name, differences in codes.items():
        by_kind: dict[str, list[list[float]]] = {}
        for node, step in plain.stored.items():
            by_kind.setdefault(kind_of(step), []).append(differences.parts[node.name])
        print(f"  codes, {name}: {fraction(differences.parts.values())}")
        for kind, parts in by_kind.items():
            print(f"    {kind}: {fraction(parts)}")


# ---- single operators ----


class Many(nn.Module):
    """One function for each of many numbers: all read the same tensors, which have one step inside a delegate."""

    def __init__(self, function: Callable[..., Tensor], numbers: list[Any]) -> None:
        super().__init__()
        self.function, self.numbers = function, numbers

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.function(*inputs, number) for number in self.numbers)


def counted(what: str, function: Callable[..., Tensor], numbers: list[Any], inputs: Any, expected: Any) -> None:
    """Print how often codes differ from the expected ones: a function of the number."""
    program = Program(Many(function, numbers).eval(), inputs)
    assert not program.outside, program.outside
    found = Differences("codes", what)
    for number, got in zip(numbers, program(*inputs), strict=True):
        found.add(str(number), got.numpy(), expected(number).to(torch.int8).numpy())
    print(f"  {what}: {fraction(found.parts.values())}, with {sum(p[1] > 0 for p in found.parts.values())} of "
          f"{len(numbers)} steps")  # fmt: skip


def steps_around(s: float, low: float, high: float, count: int) -> list[float]:
    """Return random float32 steps between s 2^low and s 2^high."""
    return (s * 2 ** (low + (high - low) * torch.rand(count))).tolist()


def inputs_near_ties() -> None:
    """Quantize the float32 numbers around every tie."""
    for what, of_step in (
        ("quantized as usual", lambda x, s: (x, s)),
        ("divided, then quantized", lambda x, s: (x / s, 1.0)),
    ):
        s = steps_around(0.02, -1, 1, OPERATORS)
        ties = torch.arange(-128, 127, dtype=torch.float64) + 0.5
        near = [(ties * step).float() for step in s]
        near = [torch.stack([(t.view(torch.int32) + i).view(torch.float32) for i in range(-3, 4)]) for t in near]
        x = torch.stack(near)

        def function(x: Tensor, i: int, of_step: Any = of_step, s: Any = s) -> Tensor:
            value, step = of_step(x, s[i])
            return Q.quantize_per_tensor(value, step, 0, *INT8)

        def expected(i: int, x: Tensor = x, s: Any = s) -> Tensor:
            return torch.round(x / s[i]).clamp(LOWEST, HIGHEST)

        counted(f"input near ties, {what}", function, list(range(len(s))), (x,), expected)


def all_sums() -> None:
    """Add all pairs of codes, to steps as they are drawn and as ``fuse`` raises them."""
    a = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.int8).reshape(-1, 1).expand(256, 256).contiguous()
    b = a.T.contiguous()
    for zeros in ((-SHIFT, -SHIFT, -SHIFT), (0, -SHIFT, -SHIFT), (0, 0, 0)):
        (s,) = steps_around(0.02, -1, 1, 1)
        drawn = [*steps_around(s, -0.5, 3, OPERATORS - 2), 2 * s, 4 * s]
        largest = sum(SHIFT if zero == 0 else HIGHEST + SHIFT for zero in zeros[:2])
        raised = [reference.safe_output_step(s, s_y, largest) for s_y in drawn]

        def function(a: Tensor, b: Tensor, s_y: float, s: float = s, z: Any = zeros) -> Tensor:
            real = [Q.dequantize_per_tensor(q, s, zero, *INT8) for q, zero in zip((a, b), z[:2], strict=True)]
            return Q.quantize_per_tensor(real[0] + real[1], s_y, z[2], *INT8)

        def expected(s_y: float, s: float = s, z: Any = zeros) -> Tensor:
            total = a.double() - z[0] + b.double() - z[1]
            return (torch.round(total * s / s_y) + z[2]).clamp(LOWEST, HIGHEST)

        for what, steps in (("as drawn", drawn), ("raised", raised)):
            counted(f"additions, zero points {zeros}, steps {what}", function, steps, (a, b), expected)


def all_means(size: int) -> None:
    """Average size x size codes: sums from the lowest to the highest, evenly spaced."""
    count, channels = size * size, 1024
    sums = torch.linspace(LOWEST * count, HIGHEST * count, channels).round().long()
    share = torch.div(sums, count, rounding_mode="floor")
    x = share.reshape(-1, 1) + (torch.arange(count) < (sums - share * count).reshape(-1, 1))
    x = x.to(torch.int8).reshape(1, channels, size, size)
    for zero in (-SHIFT, 0):
        (s,) = steps_around(0.02, -1, 1, 1)
        drawn = torch.tensor(steps_around(s, -3, 0.5, OPERATORS))
        near = s * 2 * torch.arange(1, OPERATORS + 1) / torch.tensor(3.0 * count)  # many sums are close to ties

        def factor(s_y: float, s: float = s) -> Tensor:
            return torch.tensor(s) / (torch.tensor(s_y) * count)

        def expected(s_y: float, zero: int = zero, factor: Any = factor) -> Tensor:
            total = (x.long().sum((2, 3), keepdim=True) - zero * count).float()
            return (torch.round(total * factor(s_y)) + zero).clamp(LOWEST, HIGHEST)

        def mean(x: Tensor, s_y: float, zero: int = zero, s: float = s) -> Tensor:
            y = Q.dequantize_per_tensor(x, s, zero, *INT8).mean((2, 3), keepdim=True)
            return Q.quantize_per_tensor(y, s_y, zero, *INT8)

        for what, steps in (("drawn", drawn.tolist()), ("near ties", near.tolist())):
            label = f"means of {size} x {size}, zero point {zero}, steps {what}"
            counted(f"{label}, as usual", mean, steps, (x,), expected)
            pairs = [(s_y, step_for(factor(s_y), torch.tensor(s), torch.tensor(s_y))) for s_y in steps]
            found = {s_y: w for s_y, w in pairs if w is not None}
            layers = Layers(s, zero, [channels, 1, size, size], found)
            counted(f"{label}, as layers", layers, list(found), (x,), expected)


class Layers(nn.Module):
    """Averages as depthwise layers.

    found: step of the output -> that of the weights.
    """

    def __init__(self, s: float, zero: int, shape: list[int], found: dict[float, Tensor]):
        super().__init__()
        self.s, self.zero, self.places = s, zero, {s_y: i for i, s_y in enumerate(found)}
        self.register_buffer("zeros", torch.zeros(shape[0], dtype=torch.int64))
        self.register_buffer("nothing", torch.zeros(shape[0]))
        for i, value in enumerate(found.values()):  # weights that are shared would have the step of the first of them
            self.register_buffer(f"ones{i}", torch.ones(shape, dtype=torch.int8))
            self.register_buffer(f"step{i}", value.expand(shape[0]).clone())

    def forward(self, x: Tensor, s_y: float) -> Tensor:
        ones, step = (getattr(self, f"{name}{self.places[s_y]}") for name in ("ones", "step"))
        real = Q.dequantize_per_tensor(x, self.s, self.zero, *INT8)
        weight = Q.dequantize_per_channel(ones, step, self.zeros, 0, *INT8)
        y = F.conv2d(real, weight, self.nothing, groups=len(ones))
        return Q.quantize_per_tensor(y, s_y, self.zero, *INT8)


def operators() -> None:
    """Print which operators, alone, give other codes."""
    inputs_near_ties()
    all_sums()
    all_means(7)


# ---- time ----


def timed(model: nn.Module, network: FusedNetwork, x: Tensor, rounds: int = 7) -> None:
    """Print medians of the time for one batch, in turns, on one core.

    model: the float network.
    """
    calls: dict[str, Callable[[], Any]] = {}
    forms = {"float": model, "as usual": Written(network, x), "exact form": Written(network, x, exact=True)}
    for name, form in forms.items():
        program = Program(form.eval(), (x,))
        calls[f"ExecuTorch, {name}"] = lambda program=program: program(x)
    with tempfile.TemporaryDirectory() as folder:
        path = lsquant.export_onnx(network, Path(folder) / "network.onnx", x, profile="integer")
        session = lsquant.onnx_session(path, intra_op_num_threads=1)
        given = {session.get_inputs()[0].name: x.numpy()}
        calls["ONNX Runtime, integer"] = lambda: session.run(None, given)
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                call()
                start = time.perf_counter()
                call()
                found[name].append(1000 * (time.perf_counter() - start))
    for name, times in found.items():
        print(f"  {name}: {statistics.median(times):.2f} ms a batch of {len(x)}")


def listed(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items())) or "nothing"


def fraction(parts: Iterable[list[float]]) -> str:
    compared, wrong, largest = 0, 0, 0.0
    for part in parts:
        compared, wrong, largest = compared + int(part[0]), wrong + int(part[1]), max(largest, part[2])
    return f"{wrong:,} of {compared:,} differ" + (f", by at most {largest:.3g}" if wrong else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--operators", action="store_true", help="single operators, on all sums and near ties, too")
    parser.add_argument("--time", action="store_true", help="measure the time instead, on one core")
    a = parser.parse_args()
    if a.time:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"executorch {metadata.version('executorch')}, torch {torch.__version__}, {a.images} images")
    torch.manual_seed(0)
    if a.operators:
        operators()
    for name in a.networks:
        make, side = NETWORKS[name]
        for bits in a.bits:
            torch.manual_seed(0)
            model = with_random_norms(make())
            network = fused(copy.deepcopy(model), bits, [torch.randn(64, 3, side, side)])
            batches = list(torch.randn(a.images, 3, side, side).split(BATCH))
            print(f"{name}, {bits}", flush=True)
            if a.time:
                timed(model, network, batches[0])
            else:
                compared(network, batches)


if __name__ == "__main__":
    main()
