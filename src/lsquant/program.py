"""The program of an integer-only network: which steps run, in order, and which tensors between them are codes.

A layer, the BatchNorm behind it and the limit (ReLU, ReLU6, clip) behind that are one step, where nothing else reads
what lies between them.  So are an addition, a product or an average and the limit behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn

from lsquant import nn as lnn
from lsquant._util.nested import tensors_in
from lsquant.dataflow import Flow, Node, Role
from lsquant.joining import Storage, storages
from lsquant.nn import ExactBatchNorm, QuantizedLayer, StoredInputs
from lsquant.quantizer import Quantizer
from lsquant.spec import QuantSpec

_Conv = nn.modules.conv._ConvNd


class Kind(Enum):
    """What a step computes; see docs/integer-only.md."""

    QUANTIZE = "quantize"
    LAYER = "layer"
    ADD = "add"
    MULTIPLY = "multiply"
    CAT = "cat"
    AVERAGE = "average"
    FUNCTION = "function"
    MOVE = "move"
    FLOAT = "float"


@dataclass(frozen=True, eq=False)
class Step:
    """One step.

    node: the call that it begins with; of QUANTIZE, the one whose output becomes codes.
    end: the call whose output it makes.
    norm: the BatchNorm that is folded into a layer.
    limit: the module that bounds the output.
    """

    kind: Kind
    node: Node
    end: Node
    norm: ExactBatchNorm | None = None
    limit: nn.Module | None = None

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def module(self) -> Any:
        return self.node.module


@dataclass(frozen=True)
class Program:
    """The steps in order of execution.

    stored: node -> the quantizer of the codes that its output is stored as; None for floating point.
    settled: what ``fusion`` found of the steps, kept until one changes.
    """

    flow: Flow
    steps: list[Step]
    stored: dict[Node, Quantizer | None]
    settled: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def floats(self) -> list[Step]:
        """The steps that compute in floating point."""
        return [step for step in self.steps if step.kind is Kind.FLOAT]


def program_of(flow: Flow, joins: QuantSpec) -> Program:
    """Return the program of a prepared model."""
    found = storages(flow, joins)
    of_storage = {storage: _quantizer_of(storage) for storage in dict.fromkeys(found.values())}
    stored = {node: of_storage[found[node]] for node in flow.nodes}
    steps: list[Step] = []
    folded: set[Node] = set()
    for node in flow.nodes:
        if node in folded or node.kind == "output":
            continue
        step = _step(flow, node, stored)
        if step is None:
            if node.kind != "input":
                steps.append(Step(Kind.FLOAT, node, node))
            if stored[node] is not None:
                steps.append(Step(Kind.QUANTIZE, node, node))
            continue
        steps.append(step)
        folded.update(_path(flow, node, step.end))
    return Program(flow, steps, stored)


def gives_parts(node: Node) -> bool:
    """Tell whether a call gives several tensors: the parts of one, which are taken one by one."""
    return isinstance(node.module, (lnn.Chunk, lnn.Split))


def whole(node: Node) -> Node:
    """Return the node of a tensor; of parts, that of the tensor which they are cut from."""
    return whole(node.inputs[0]) if gives_parts(node) else node


def output_nodes(flow: Flow) -> list[Node]:
    """Return the nodes of the tensors that a model returns, as ``tensors_in`` finds them in its output."""
    end = next(node for node in reversed(flow.nodes) if node.kind == "output")
    stands_for: dict[int, Node] = {}
    kept: list[Tensor] = []

    def placed(call: fx.Node) -> Tensor:
        kept.append(torch.empty(0))
        stands_for[id(kept[-1])] = flow.of[call]
        return kept[-1]

    return [stands_for[id(tensor)] for tensor in tensors_in(fx.map_arg(end.call.args[0], placed))]


def _quantizer_of(storage: Storage) -> Quantizer | None:
    for reader, place in storage.ports:
        module = reader.module
        if isinstance(module, StoredInputs):
            return module.quantizer_of(place)
        if isinstance(module, QuantizedLayer):
            return module.input_quantizer if module.stored_quantizer is None else module.stored_quantizer
    return None


_LIMITED = {Role.ADD: Kind.ADD, Role.MULTIPLY: Kind.MULTIPLY, Role.AVERAGE: Kind.AVERAGE}
"""Steps with which the limit behind them is one step."""


def _step(flow: Flow, node: Node, stored: dict[Node, Quantizer | None]) -> Step | None:
    """Return the step that computes a node on codes; None where it has to be floating point."""
    if node.role is None or any(stored[source] is None for source in node.inputs):
        return None
    if node.role is Role.LAYER:
        layer = node.module
        if not isinstance(layer, QuantizedLayer) or layer.weight_quantizer is None or layer.input_quantizer is None:
            return None
        if layer.weight_quantizer.spec.group_size is not None or not isinstance(layer, (nn.Linear, _Conv)):
            return None  # groups have no one scale a channel
        if len(node.call.args) + len(node.call.kwargs) > 1:
            return None  # the output size of a transposed convolution
        norm = _only_reader(flow, node, Role.NORM)
        if norm is not None and not isinstance(norm.module, ExactBatchNorm):
            norm = None
        limit = _only_reader(flow, norm or node, Role.LIMIT)
        batch_norm: Any = None if norm is None else norm.module
        end = limit or norm or node
        return Step(Kind.LAYER, node, end, batch_norm, None if limit is None else limit.module)
    if node.role in _LIMITED:
        limit = _only_reader(flow, node, Role.LIMIT)
        end = limit or node
        if len(node.inputs) > 2 or stored[end] is None:
            return None
        return Step(_LIMITED[node.role], node, end, None, None if limit is None else limit.module)
    kind = {Role.CAT: Kind.CAT, Role.FUNCTION: Kind.FUNCTION, Role.MOVE: Kind.MOVE}.get(node.role)
    return None if kind is None or stored[node] is None else Step(kind, node, node)


def _only_reader(flow: Flow, node: Node, role: Role) -> Node | None:
    """Return the node that alone reads a tensor, where it has this role."""
    readers = flow.readers[node]
    return readers[0][0] if len(readers) == 1 and readers[0][0].role is role else None


def _path(flow: Flow, node: Node, end: Node) -> list[Node]:
    """Return the nodes from one to another, of which each is the only reader of the one before."""
    path = [node]
    while path[-1] is not end:
        path.append(flow.readers[path[-1]][0][0])
    return path
