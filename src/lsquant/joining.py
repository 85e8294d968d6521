"""Stored tensors: which tensors of a network are codes, and which of them have one step.

Every tensor that a quantized layer, an addition, a concatenation, an average or an elementwise function reads is stored
as codes, up to the last layer: what leads only to the outputs stays floating point.  Its quantizer is shared by all who
read it at its bits.  Two relations join tensors:

- What only moves values (max pooling, slices, padding, flatten) and concatenation have inputs and outputs of one step
  and one sign: one quantizer.  Such tensors are a *storage*.
- The operands of an addition have one step: their storages have one owner of the step, and signs of their own
  (``TiedQuantizer``).  They have no offset, so z = 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import nn

from lsquant._util.errors import UsageError
from lsquant.dataflow import Flow, Node, Role
from lsquant.nn import STORED_TYPES, QuantAdd, QuantizedLayer, QuantMul, StoredInputs, float_type, quantizers
from lsquant.quantizer import Quantizer
from lsquant.spec import QuantSpec
from lsquant.tied import TiedQuantizer

T = TypeVar("T")
Former = dict[tuple[nn.Module, int], Quantizer]
STORED = "_lsquant_stored"
"""Name of the attribute of a model whose joins are quantized: the specification of what they read."""

JOINS = (Role.ADD, Role.MULTIPLY, Role.CAT, Role.AVERAGE, Role.FUNCTION)


def require_outermost(model: nn.Module, caller: str) -> None:
    """Raise UsageError where joins are those of a model inside this one, as in a ``FusedNetwork``."""
    if any(STORED in vars(module) for module in model.modules() if module is not model):
        raise UsageError(
            f"{caller}: a model inside this {type(model).__name__} was prepared with joins; give that one, as "
            "network.model"
        )


class Sets(Generic[T]):
    """Disjoint sets; the earliest member of a set speaks for it."""

    def __init__(self, items: Iterable[T]) -> None:
        self._order = {item: number for number, item in enumerate(items)}
        self._above = {item: item for item in self._order}

    def first(self, item: T) -> T:
        """Return the earliest member of an item's set."""
        while (above := self._above[item]) != item:
            self._above[item] = item = self._above[above]
        return item

    def join(self, a: T, b: T) -> None:
        """Make one set of two."""
        a, b = self.first(a), self.first(b)
        early, late = sorted((a, b), key=self._order.__getitem__)
        self._above[late] = early


@dataclass(eq=False)
class Storage:
    """Tensors of one step and one sign.

    tensors: the nodes whose outputs they are, in order of execution.
    ports: (reader, place of the input) of layers and joins that read one of them, each module once.
    bits: with which it is stored; None where nothing reads codes, so that it stays floating point.
    owner: of the step; itself, or a storage that is added to it.
    """

    tensors: list[Node] = field(default_factory=list)
    ports: list[tuple[Node, int]] = field(default_factory=list)
    bits: int | None = None
    owner: Storage | None = None

    @property
    def is_added(self) -> bool:
        """Whether an addition reads one of the tensors: they have no offset then."""
        return any(reader.role is Role.ADD for reader, _ in self.ports)


def storages(flow: Flow, joins: QuantSpec | None) -> dict[Node, Storage]:
    """Find the storage of every tensor.

    flow: of a prepared model.
    joins: of what joins read; None: they read floating point.
    Returns: node -> the storage of its output.
    """
    before = flow.before_layers()
    tensors = Sets(flow.nodes)
    by_port: dict[tuple[nn.Module, int], Node] = {}
    for reader, place, source in flow.ports():
        joined = joins is not None and reader in before
        if reader.role is Role.MOVE or (reader.role is Role.CAT and joined):
            tensors.join(reader, source)
        # a module called twice
        if reader.module is not None and (reader.role is Role.LAYER or (reader.role in JOINS and joined)):
            tensors.join(by_port.setdefault((reader.module, place), source), source)
    found: dict[Node, Storage] = {}
    for node in flow.nodes:
        first = tensors.first(node)
        storage = found.setdefault(node, found.get(first) or Storage())
        storage.tensors.append(node)
    seen: set[tuple[nn.Module, int]] = set()
    for reader, place, source in flow.ports():
        bits = _bits_read(reader, joins if reader in before else None)
        if bits is None or reader.module is None or (reader.module, place) in seen:
            continue
        seen.add((reader.module, place))
        storage = found[source]
        storage.ports.append((reader, place))
        storage.bits = max(bits, storage.bits or 0)
    _tie([node for node in flow.nodes if node in before], found, joins)
    return found


def _bits_read(reader: Node, joins: QuantSpec | None) -> int | None:
    """Return the bits at which a node reads its inputs; None for floating point."""
    if reader.role is Role.LAYER:
        quantizer = reader.module.input_quantizer if isinstance(reader.module, QuantizedLayer) else None
        return None if quantizer is None else quantizer.requested.bits
    return joins.bits if joins is not None and reader.role in JOINS else None


def _tie(nodes: list[Node], found: dict[Node, Storage], joins: QuantSpec | None) -> None:
    """Give the storages of the operands of additions one owner and one number of bits."""
    order = list(dict.fromkeys(found.values()))
    groups = Sets(order)
    if joins is not None:
        for node in nodes:
            if node.role is Role.ADD:
                first, *others = (found[source] for source in node.inputs)
                for other in others:
                    groups.join(first, other)
    members: dict[Storage, list[Storage]] = {}
    for storage in order:
        members.setdefault(groups.first(storage), []).append(storage)
    for group in members.values():
        owner = next((s for s in group if any(reader.role is not Role.ADD for reader, _ in s.ports)), group[0])
        bits = [s.bits for s in group if s.bits is not None]
        for storage in group:
            storage.owner = owner
            storage.bits = max(bits) if bits else None


# ---- quantizers ----


def connect(model: nn.Module, flow: Flow, joins: QuantSpec, former: Former) -> None:
    """Give joins their quantizers, and every stored tensor one that all its readers share.

    model: prepared, its layers have input quantizers of their own.
    joins: of what joins read.
    former: what ``separate`` returned.
    Raises: UsageError naming a layer whose input has steps of another type than float32.
    """
    names = {module: name for name, module in model.named_modules()}
    quantizer_of: dict[Storage, Quantizer] = {}
    placed: dict[nn.Module, dict[int, Quantizer]] = {}
    found = [s for s in dict.fromkeys(storages(flow, joins).values()) if s.bits is not None]
    for storage in sorted(found, key=lambda s: s.owner is not s):  # owners first
        quantizer = quantizer_of[storage] = _quantizer(storage, joins, quantizer_of, former)
        for reader, place in storage.ports:
            module = reader.module
            assert module is not None
            if not isinstance(module, QuantizedLayer):
                placed.setdefault(module, {})[place] = quantizer
                continue
            own = module.input_quantizer
            assert own is not None
            if own.requested.step_dtype != "float32":
                raise UsageError(
                    f"layer {names[module]!r}: the step of a stored tensor is float32, not {own.requested.step_dtype}: "
                    "use joins=None, or QuantSpec without step_dtype for this layer's input"
                )
            if own.requested.bits == storage.bits:
                module.input_quantizer = quantizer
            else:
                module.stored_quantizer = quantizer
    for module, by_place in placed.items():
        kind = STORED_TYPES[float_type(module) or type(module)]
        in_order = [by_place[place] for place in sorted(by_place)]
        module.__class__ = kind
        module.input_quantizers = nn.ModuleList(in_order if kind in (QuantAdd, QuantMul) else in_order[:1])
    for name, quantizer in quantizers(model):  # each is met first where it stands in the state dict
        if quantizer in quantizer_of.values():
            quantizer.name = name
            quantizer.train(model.training)
    vars(model)[STORED] = joins


def _quantizer(storage: Storage, joins: QuantSpec, made: dict[Storage, Quantizer], former: Former) -> Quantizer:
    """Return the quantizer of a storage: that of a layer, a former one of a join, or a new one."""
    assert storage.bits is not None
    assert storage.owner is not None
    modules = [(reader.module, place) for reader, place in storage.ports if reader.module is not None]
    old = next((q for port in modules if (q := former.get(port)) is not None), None)
    spec, device = replace(joins, bits=storage.bits), _device(modules)
    spec = _without_offset(spec) if storage.is_added else spec
    if storage.owner is not storage:
        with device:
            tied = TiedQuantizer(spec, made[storage.owner])
        if isinstance(old, TiedQuantizer) and old.spec.signed is not None:
            tied._set(tied.requested.decide(old.spec.signed), tied.step)
        return tied
    inputs = [module.input_quantizer for module, _ in modules if isinstance(module, QuantizedLayer)]
    owns = [own for own in inputs if own is not None and own.requested.bits == storage.bits]
    own = next((q for q in owns if q.requested.offset != storage.is_added), owns[0] if owns else None)
    if own is not None and not (own.requested.offset and storage.is_added):
        return own
    spec = spec if own is None else _without_offset(own.requested)
    if old is not None and not isinstance(old, TiedQuantizer) and old.requested == spec:
        return old
    with device:
        return Quantizer(spec, count=None if own is None else own.elements_per_step or None)


def _without_offset(spec: QuantSpec) -> QuantSpec:
    """Return the same without an offset; calibration decides the sign that came with it."""
    return replace(spec, offset=False, signed=None) if spec.offset else spec


def _device(modules: list[tuple[nn.Module, int]]) -> torch.device:
    tensors = (t for module, _ in modules for t in (*module.parameters(), *module.buffers()))
    return next(tensors, torch.empty(0, device="cpu")).device


def separate(model: nn.Module) -> Former:
    """Take stored tensors apart: every layer has an input quantizer of its own again, with its values, and joins none.

    Returns: (join or layer, place of its input) -> the quantizer that it had.
    """
    former: Former = {}
    if STORED not in vars(model):
        return former
    seen: set[Quantizer] = set()
    for module in model.modules():
        if isinstance(module, StoredInputs):
            own = range(len(module.input_quantizers))
            former.update({(module, place): module.quantizer_of(place) for place in own})
            del module.input_quantizers
            module.__class__ = _before(module)  # type: ignore[assignment]
        elif isinstance(module, QuantizedLayer):
            own = module.input_quantizer
            if module.stored_quantizer is not None:
                former[module, 0] = module.stored_quantizer
            elif own is not None:
                former[module, 0] = own
            module.stored_quantizer = None
            if own is not None and (own in seen or isinstance(own, TiedQuantizer)):
                module.input_quantizer = _alone(own)
            if own is not None:
                seen.add(own)
    del vars(model)[STORED]
    return former


def _alone(shared: Quantizer) -> Quantizer:
    """Return a quantizer with a step of its own and the values of a shared one."""
    with shared.step.device:
        alone = Quantizer(shared.requested, count=shared.elements_per_step or None)
    if shared.is_initialized:
        alone.adopt(shared)
    alone.name, alone.enabled = shared.name, shared.enabled
    return alone


def _before(module: StoredInputs) -> type[nn.Module]:
    """Return the class that a join had before its inputs were stored."""
    return next(kind for kind in type(module).__mro__[1:] if kind is not StoredInputs and issubclass(kind, nn.Module))
