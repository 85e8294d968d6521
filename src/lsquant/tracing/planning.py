"""What a block becomes: its graphs in both modes, with modules in the place of functions."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from lsquant._util.nested import tensors_in
from lsquant.tracing.blocks import Plan, code_of, traced_class
from lsquant.tracing.example import Call, fresh, steady
from lsquant.tracing.functions import At, Replacement, replacement
from lsquant.tracing.graph import BlockTracer, copied
from lsquant.tracing.places import Place, Untraceable, raised_at, spoken
from lsquant.tracing.result import TracedBlock
from lsquant.tracing.state import state_untouched

_STRUCTURE = {
    *("getattr", "getitem", "setattr", "setitem", "size", "dim", "numel", "contiguous", "to", "detach"),
    *("view", "reshape", "permute", "transpose", "unsqueeze", "squeeze", "expand", "expand_as"),
}
"""Functions that compute nothing: no row of ``Traced`` names them."""


def plan(name: str, call: Call, strict: bool) -> tuple[Plan, TracedBlock] | None:
    """Trace a block in both modes and decide what it becomes; None where none of its functions is replaced.

    strict: whether an in-place function that cannot be replaced is an error; False: it stays.
    """
    block = call.block
    if isinstance(block, fx.GraphModule):
        raise Untraceable("it is a torch.fx GraphModule, whose copies would lose the change; trace what it came from")
    if "forward" in vars(block):
        raise Untraceable("its forward was replaced by an attribute")
    evaluation = _Graph(block, name, call, training=False)
    names = evaluation.replace({}, strict)
    if not names:
        if evaluation.kept:
            raise evaluation.kept[0]
        return None
    training = _Graph(block, name, call, training=True)
    training.replace(names, strict=True)
    modules = {new: r for new, (r, _) in evaluation.inserted.items()}
    moved = tuple((own, new, inner) for new, r in modules.items() for inner, own in r.parameters.items())
    code = code_of(evaluation.graph, training.graph, moved)
    try:
        before, kind = type(block), traced_class(type(block), code)
        block.__class__ = kind  # may raise, for a class with __slots__ for instance
        block.__class__ = before
    except Exception as error:  # whatever a metaclass or __init_subclass__ of the user's may raise
        raise Untraceable(f"no subclass of its class can be made: {error}") from error
    prefix = f"{name}." if name else ""
    row = TracedBlock(
        name,
        type(block).__name__,
        {new: f"{r.kind.__name__} ({spoken(place)})" for new, (r, place) in evaluation.inserted.items()},
        evaluation.left(),
        tuple((prefix + own, f"{prefix}{new}.{inner}") for own, new, inner in moved),
    )
    return Plan(block, kind, modules, moved), row


Key = tuple[str, Place | None, int]
"""A module in words, the place of its function, which of those with both equal."""


class _Graph:
    """The graph of a block in one mode.

    inserted: name of each new module -> what it is, and where the function stands.
    kept: why in-place functions stay what they are.
    """

    def __init__(self, block: nn.Module, name: str, call: Call, training: bool) -> None:
        self.block = block
        self.inserted: dict[str, tuple[Replacement, Place | None]] = {}
        self.kept: list[Untraceable] = []
        try:
            self._trace(name, call, training, training)
        except Untraceable:
            if not training:
                raise
            self._trace(name, call, training, False)  # BatchNorm wants more than one value of a channel, for instance
        self.values = self.tracer.values
        self.at = At(self.values, self._activations(), training)

    def _trace(self, name: str, call: Call, training: bool, inner: bool) -> None:
        """Trace the block in a mode, with the modules in it in one of their own."""
        self.tracer = BlockTracer(name, copied(call.args, fresh), copied(call.kwargs, fresh))
        with steady(self.block):
            self.block.train(inner)
            self.block.training = training
            try:
                with state_untouched(self.block):
                    self.graph = self.tracer.trace(self.block)
            except Untraceable as error:
                error.place = error.place or raised_at(error.__traceback__)
                raise
            except Exception as error:
                raise Untraceable(_in_words(error, training), raised_at(error.__traceback__)) from error

    def _activations(self) -> set[Node]:
        """Return the nodes whose value depends on the inputs, not by their sizes alone."""
        found: set[Node] = set()
        for node in self.graph.nodes:
            depends = node.op in ("placeholder", "call_module") or any(n in found for n in node.all_input_nodes)
            if depends and not isinstance(self.values.get(node), (int, float, torch.Size, torch.dtype, torch.device)):
                found.add(node)
        return found

    def replace(self, names: dict[Key, str], strict: bool) -> dict[Key, str]:
        """Put calls of modules in the place of functions.

        names: what the other mode has named; empty: names are given here.
        strict: False: an in-place function that cannot be replaced stays.
        Returns: the names.
        """
        first = not names
        count: Counter[tuple[str, Place | None]] = Counter()
        for node in list(self.graph.nodes):
            found = replacement(node, self.at)
            if found is None:
                continue
            place = self.tracer.places[node]
            key = (found.spoken, place, count[found.spoken, place])
            count[found.spoken, place] += 1
            if not first and key not in names:
                continue
            try:
                readers = self._later_readers(node, found) if found.in_place else []
            except Untraceable as error:
                if strict:
                    raise
                self.kept.append(error)
                continue
            if first:
                names[key] = self._free_name(found.name)
            self.inserted[names[key]] = (found, place)
            for reader, read in readers:
                reader.replace_input_with(read, node)
            self._call_instead(node, names[key], found)
        self._forget_unused()
        return names

    def _free_name(self, wanted: str) -> str:
        number, name = 1, wanted
        while hasattr(self.block, name) or name in self.inserted:
            number += 1
            name = f"{wanted}_{number}"
        return name

    def _call_instead(self, node: Node, name: str, found: Replacement) -> None:
        with self.graph.inserting_before(node):
            called = self.graph.create_node("call_module", name, found.operands, {}, f"{name}_out")
        for known in (self.values, self.tracer.places):
            known[called] = known[node]  # type: ignore[index]
        node.replace_all_uses_with(called)
        self.at.activations.add(called)
        self.graph.erase_node(node)

    def _later_readers(self, node: Node, found: Replacement) -> list[tuple[Node, Node]]:
        """Say who reads the changed tensor after an in-place function, and by which name: they are to read the result.

        Raises: Untraceable where a module that gives a new tensor is not the same.
        """
        readers: list[tuple[Node, Node]] = []
        changed = node.args[0]
        assert isinstance(changed, Node)
        tensor = self.values[changed]
        before, later = _around(node)
        sharing = [other for other in before if _share_memory(self.values.get(other), tensor)]
        is_part = self.values[sharing[0]] is not tensor  # a view: the gradient of what it is a part of goes another way
        for other in sharing:
            users = [user for user in other.users if user in later]
            own = other.op in ("placeholder", "get_attr")
            if self.values[other] is tensor and not own:
                readers += [(user, other) for user in users]
            elif not found.keeps_in_place and (users or own or is_part):
                what = "a tensor that the block was given or owns" if own else "a tensor that is read in parts"
                raise Untraceable(f"{node.name} changes in place {what}", self.tracer.places[node])
        return readers

    def _forget_unused(self) -> None:
        """Remove parts of inputs and outputs that nothing uses."""
        for node in reversed(list(self.graph.nodes)):
            pure = node.target in (getattr, len) or getattr(node.target, "__name__", "") == "getitem"
            if not node.users and (node.op == "get_attr" or (node.op == "call_function" and pure)):
                self.graph.erase_node(node)

    def left(self) -> tuple[str, ...]:
        """Name the functions that compute with activations and stay functions, each once."""
        found = {}
        for node in self.graph.nodes:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            tensor = isinstance(self.values.get(node), Tensor) and node in self.at.activations
            if node.op in ("call_function", "call_method") and tensor and name.strip("_") not in _STRUCTURE:
                found[name.strip("_")] = True
        return tuple(found)


def _in_words(error: Exception, training: bool) -> str:
    """Return an error that a forward raised while it was traced."""
    if isinstance(error, TypeError) and re.search(r"ValueProxy|^\w+\(\) takes \d+ positional", str(error)):
        return "a size is given to a function that takes numbers only; give sizes in a tuple: torch.rand((n, 1))"
    mode = "in training mode " if training else ""
    return f"{mode}{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _around(node: Node) -> tuple[list[Node], set[Node]]:
    """Return the nodes of a graph before a node, in order, and those after it."""
    nodes = list(node.graph.nodes)
    place = nodes.index(node)
    return nodes[:place], set(nodes[place + 1 :])


def _share_memory(value: Any, tensor: Tensor) -> bool:
    return any(t.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for t in tensors_in(value))
