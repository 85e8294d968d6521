"""Which module reads which tensor: the graph of a model's forward pass, from ``torch.fx``.

Layers, joins and functions are nodes, as they are after ``trace``; what else a forward does (a function that is not a
module) is a node without a role, and its inputs and outputs are floating point.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import fx, nn

from lsquant import nn as lnn
from lsquant._util.errors import UsageError
from lsquant.nn.pool import WINDOWS, is_windowed, window_geometry
from lsquant.nn.stored import FUNCTIONS


class Role(Enum):
    """What a module does to codes."""

    LAYER = "layer"
    NORM = "norm"
    LIMIT = "limit"
    MOVE = "move"
    ADD = "add"
    MULTIPLY = "multiply"
    CAT = "cat"
    AVERAGE = "average"
    FUNCTION = "function"


_MOVES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Flatten, nn.Unflatten, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle, lnn.Slice, lnn.Chunk, lnn.Split, lnn.Resize,
)  # fmt: skip
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_ROLES: tuple[tuple[tuple[type, ...], Role], ...] = (
    ((nn.modules.batchnorm._BatchNorm,), Role.NORM),
    ((nn.ReLU, nn.ReLU6, nn.Hardtanh, lnn.Clip), Role.LIMIT),
    (_MOVES, Role.MOVE),
    ((lnn.Add,), Role.ADD),
    ((lnn.Mul,), Role.MULTIPLY),
    ((lnn.Cat,), Role.CAT),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, lnn.Mean, *WINDOWS), Role.AVERAGE),
    (FUNCTIONS, Role.FUNCTION),
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def role_of(module: nn.Module) -> Role | None:
    """Return what a module does to codes; None for one that computes in floating point."""
    kind = lnn.quantized_type(module)
    if kind is not None:
        return Role.LAYER if kind.takes_codes else None
    for types, role in _ROLES:
        if isinstance(module, types):
            return role if _is_plain(module, role) else None
    if isinstance(module, nn.Upsample):
        return Role.MOVE if module.mode == "nearest" else None
    if isinstance(module, (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)):
        return Role.MOVE if module.value == 0 else None
    return None


def _is_plain(module: Any, role: Role) -> bool:
    """Tell whether a module has the parameters with which its role is what it does."""
    if is_windowed(module):  # every window has the same number of positions
        is_padded = not module.count_include_pad and any(window_geometry(module)[2])
        return not (module.ceil_mode or is_padded or getattr(module, "divisor_override", None))
    if role is Role.AVERAGE and not isinstance(module, lnn.Mean):
        size = module.output_size
        return all(n == 1 for n in (size if isinstance(size, (tuple, list)) else (size,)))
    if role is Role.MOVE:
        return not getattr(module, "return_indices", False)
    return role is not Role.NORM or module.running_mean is not None


@dataclass(frozen=True, eq=False)
class Node:
    """One call in the forward pass.

    name: of the module, and of its second call ``NAME#2``; of a function or an input, what ``torch.fx`` calls it.
    module: that is called; None for a function or an input of the model.
    role: what it does to codes; None where it computes in floating point.
    inputs: the nodes whose outputs it reads, in order.
    kind: "input", "call", "function" or "output".
    call: the same in ``torch.fx``, with all its arguments.
    """

    name: str
    module: nn.Module | None
    role: Role | None
    inputs: tuple[Node, ...]
    kind: str
    call: fx.Node

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(n.name for n in self.inputs)})"


class Flow:
    """The calls of a forward pass, in order of execution.  Equal names are calls of one module.

    nodes: all of them; dropout and identities are left out, their readers read what they read.
    of: call in ``torch.fx`` -> its node, or the node that stands for it.
    model: whose they are.
    """

    def __init__(self, nodes: list[Node], of: dict[fx.Node, Node], model: nn.Module) -> None:
        self.nodes, self.of, self.model = nodes, of, model
        self.readers: dict[Node, list[tuple[Node, int]]] = {node: [] for node in nodes}
        for node in nodes:
            for place, source in enumerate(node.inputs):
                self.readers[source].append((node, place))

    def ports(self) -> Iterator[tuple[Node, int, Node]]:
        """Yield (reader, place of the input, source) of every tensor that is read."""
        for node in self.nodes:
            for place, source in enumerate(node.inputs):
                yield node, place, source

    def before_layers(self) -> set[Node]:
        """Return the calls from which a layer that takes codes is reached, layers included; all calls of a module."""
        calls: dict[nn.Module, list[Node]] = {}
        for node in self.nodes:
            if node.module is not None:
                calls.setdefault(node.module, []).append(node)
        found: set[Node] = set()
        waiting = [node for node in self.nodes if node.role is Role.LAYER]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += node.inputs
                waiting += [] if node.module is None else calls[node.module]
        return found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _CONTAINERS):
            return False
        own = type(m).__module__.startswith("lsquant.nn")
        return own or role_of(m) is not None or super().is_leaf_module(m, module_qualified_name)


def dataflow(model: nn.Module, caller: str) -> Flow:
    """Follow the forward pass of a model.

    caller: the function that needs it, for the message.
    Raises: UsageError where ``torch.fx`` cannot follow it, with its reason.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"{caller}: which tensor is read where cannot be followed in {type(model).__name__} ({reason}); call "
            "lsquant.trace(model, example_inputs) first, or write what depends on values without Python branches"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[fx.Node, Node] = {}
    nodes: list[Node] = []
    times: dict[str, int] = {}
    for call in graph.nodes:
        sources = tuple(found[source] for source in call.all_input_nodes)
        name, module, role = call.name, None, None
        kind = {"placeholder": "input", "output": "output", "call_module": "call"}.get(call.op, "function")
        if kind == "call":
            name = str(call.target)
            module = modules[name]
            if isinstance(module, _NOTHING):  # dropout outside of training
                found[call] = sources[0]
                continue
            role = role_of(module)
            sources = tuple(found[a] for a in call.args if isinstance(a, fx.Node)) or sources
        elif call.target is operator.getitem and sources[0].role is Role.MOVE:
            role = Role.MOVE
        if role in (Role.ADD, Role.MULTIPLY) and len(sources) != 2:  # the other operand is a number
            role = None
        times[name] = times.get(name, 0) + 1
        name += f"#{times[name]}" if times[name] > 1 else ""
        found[call] = Node(name, module, role, sources, kind, call)
        nodes.append(found[call])
    return Flow(nodes, found, model)
