"""``trace``: run the example, trace the blocks that use functions, exchange them, compare."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node
from torch.overrides import TorchFunctionMode

from lsquant._util.batches import evaluating, model_inputs, unwrapped
from lsquant._util.errors import UsageError
from lsquant._util.nested import map_tensors, tensors_in
from lsquant.nn import quantized_type
from lsquant.tracing import blocks
from lsquant.tracing.functions import SUGGESTIONS, At, Replacement, replacement
from lsquant.tracing.graph import BlockTracer, copied
from lsquant.tracing.guard import Unexpected
from lsquant.tracing.places import Place, Untraceable, current_place, raised_at, spoken
from lsquant.tracing.result import Traced, TracedBlock

_STRUCTURE = {"getattr", "getitem", "expect", "size", "dim", "numel", "contiguous", "truth", "len", "keys", "to", "view",
              "reshape", "permute", "transpose", "unsqueeze", "squeeze", "expand", "expand_as", "detach"}  # fmt: skip
"""Functions that compute nothing: no row of ``Traced`` names them."""


def trace(model: nn.Module, example_inputs: Any, *, strict: bool = True) -> Traced:
    """Put modules in the place of functions, in the forward of every block of a model, in place.

    ``x + y`` in block ``layer1.0`` becomes ``self.add(x, y)`` with ``layer1.0.add``, an ``lsquant.nn.Add``; so do ``torch.cat``,
    ``F.relu``, pooling, means over space and the like (docs/tracing.md has the table).  Outputs stay equal bit for bit.

    model: any nn.Module; parameters, classes (by isinstance), hooks and mode stay.
    example_inputs: one batch (a tensor; a tuple or list, whose first element counts; a mapping).
    strict: whether a block that uses functions and cannot be traced is an error; False: it stays as it is, and its row says why.
    Returns: Traced, a row per block.
    Raises: UsageError naming file, line and what to write instead; the model is then unchanged.

    >>> class Residual(nn.Module):
    ...     def forward(self, x):
    ...         return x.relu() + x
    >>> print(lsquant.trace(nn.Sequential(Residual()), torch.ones(2, 3)))
    block  type      new modules  note
    0      Residual  relu, add
    1 blocks traced, 2 modules inserted
    """
    _check_arguments(model, strict)
    args, kwargs = model_inputs(example_inputs)
    before = _Run(model)
    outputs = before.run(args, kwargs)
    doubled = _doubled(args, kwargs)
    doubled_outputs = None if doubled is None else _output_or_none(model, *doubled)
    plans: dict[str, tuple[blocks.Plan, TracedBlock]] = {}
    failures: dict[str, Untraceable] = {}
    for name, call in before.calls.items():
        try:
            if call.functions and (found := _plan(name, call)) is not None:
                plans[name] = found
        except Untraceable as error:
            failures[name] = error
    if failures and strict:
        raise UsageError("trace: " + "\n".join(_failure(name, before.calls[name], e) for name, e in failures.items()))

    while True:
        undone = []
        try:
            for plan, _ in plans.values():
                undone.append((plan, (type(plan.block), dict(plan.block._parameters))))
                blocks.apply(plan)
            _compare(before, outputs, args, kwargs)
            if doubled is not None and doubled_outputs is not None:
                _compare_doubled(model, doubled_outputs, *doubled)
            break
        except BaseException as error:
            for plan, state in reversed(undone):
                blocks.undo(plan, state)
            if not isinstance(error, _Different):
                raise
            if strict or error.block not in plans:
                raise UsageError(f"trace: {error}") from error
            failures[error.block] = Untraceable(str(error))
            del plans[error.block]
    rows = [row for _, row in plans.values()]
    rows += [_untraced(name, before.calls[name], error) for name, error in failures.items()]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return Traced(sorted(rows, key=lambda row: order[row.name]))


def _check_arguments(model: Any, strict: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"trace: the model is a {type(model).__name__}, not an nn.Module")
    if not isinstance(strict, bool):
        raise UsageError(f"trace: strict={strict!r}; use True or False")
    if unwrapped(model) is not model:
        raise UsageError(f"trace: trace the model before it is wrapped in {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("trace: the model is a TorchScript module, which has no Python forward; trace the model it came from")
    if any(nn.parameter.is_lazy(p) for p in (*model.parameters(), *model.buffers())):
        raise UsageError("trace: a parameter has no shape yet (a lazy layer); run the model once before it is traced")
    if type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        raise UsageError("trace: trace the model before torch.compile")


# ---- the example ----


@dataclass
class _Call:
    """The first call of a block.

    functions: (what is called, what to write instead, place) of the functions it uses.
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    functions: list[tuple[str, str, Place | None]] = field(default_factory=list)
    output: Any = None


def is_block(module: nn.Module) -> bool:
    """Whether a module has a forward in Python that is neither torch's nor lsquant's, and is no layer that is quantized."""
    if isinstance(module, torch.jit.ScriptModule) or quantized_type(module) is not None:
        return False
    forward = type(module).forward
    home = getattr(forward, "__module__", None) or ""
    own = home.startswith("lsquant.") and not home.startswith("lsquant.tasks.")
    return not home.startswith("torch.") and not own and hasattr(forward, "__code__")


class _Run(TorchFunctionMode):
    """A run of the model that keeps the first call of each block, and the functions that the block itself uses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: dict[str, _Call] = {}
        self.stack: list[_Call | None] = []

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        hooks = []
        for name, module in self.model.named_modules():
            hooks.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leaving(name), always_call=True))
        try:
            with _steady(self.model), self:
                return self.model(*copied(args, _copy), **copied(kwargs, _copy))
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if is_block(module) and name not in self.calls:
                self.calls[name] = _Call(module, copied(args, _same), copied(kwargs, _same))
            self.stack.append(self.calls.get(name))

        return enter

    def _leaving(self, name: str) -> Any:
        def leave(module: nn.Module, _: Any, output: Any) -> None:
            call = self.stack.pop()
            if call is not None and call.output is None:
                call.output = output

        return leave

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self.stack[-1] if self.stack else None
        name = getattr(func, "__name__", "").strip("_")
        if call is not None and name in SUGGESTIONS:
            given = [t for t in tensors_in(list(args)) if t.is_floating_point() and not isinstance(t, nn.Parameter)]
            if len(given) >= (2 if name in ("add", "iadd", "mul", "imul", "multiply") else 1):
                call.functions.append((name, SUGGESTIONS[name], current_place()))
        return func(*args, **(kwargs or {}))


@contextmanager
def _steady(model: nn.Module) -> Iterator[None]:
    """Eval mode and the same random numbers each time; afterwards modes, attributes, buffers, generators are as before."""
    attributes = [(module, _attributes(module)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with evaluating(model), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(0)
            yield
    finally:
        for module, before in attributes:
            _restore(vars(module), before)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _output_or_none(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        with _steady(model):
            return model(*copied(args, _copy), **copied(kwargs, _copy))
    except Exception:  # a model that takes one batch size only
        return None


def _doubled(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """The example twice along the batch; None where there is no batch."""
    tensors = [t for t in tensors_in([args, dict(kwargs)]) if t.ndim]
    if not tensors or not len(tensors[0]):
        return None
    size = len(tensors[0])

    def twice(t: Tensor) -> Tensor:
        return torch.cat((t, t)) if t.ndim and len(t) == size else t

    return map_tensors(args, twice), map_tensors(dict(kwargs), twice)


# ---- a block ----


def _plan(name: str, call: _Call) -> tuple[blocks.Plan, TracedBlock] | None:
    """Trace a block in both modes and decide what it becomes; None where none of its functions is replaced."""
    block = call.block
    if isinstance(block, fx.GraphModule):
        raise Untraceable("it is a torch.fx GraphModule, which would lose the change when copied; trace what it came from")
    if "forward" in vars(block):
        raise Untraceable("its forward was replaced by an attribute")
    evaluation = _Graph(block, name, call, training=False)
    names = evaluation.replace({})
    if not names:
        return None
    training = _Graph(block, name, call, training=True)
    training.replace(names)
    modules = {new: r for new, (r, _) in evaluation.inserted.items()}
    moved = tuple((own, new, inner) for new, r in modules.items() for inner, own in r.parameters.items())
    code = blocks.code_of(evaluation.graph, training.graph, moved)
    try:
        kind = blocks.traced_class(type(block), code)
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
    return blocks.Plan(block, kind, modules, moved), row


Key = tuple[str, Place | None, int]
"""A module in words, the place of its function, which of those with both equal."""


class _Graph:
    """The graph of a block in one mode.

    inserted: name of each new module -> what it is, and where the function stands.
    """

    def __init__(self, block: nn.Module, name: str, call: _Call, training: bool) -> None:
        self.block = block
        self.inserted: dict[str, tuple[Replacement, Place | None]] = {}
        args, kwargs = copied(call.args, _copy), copied(call.kwargs, _copy)
        self.tracer = BlockTracer(name, args, kwargs)
        with _steady(block), _sets_nothing(block):
            block.training = training
            try:
                self.graph = self.tracer.trace(block)
            except Untraceable as error:
                error.place = error.place or raised_at(error.__traceback__)
                raise
            except Exception as error:
                raise Untraceable(_in_words(error, training), raised_at(error.__traceback__)) from error
        self.values = self.tracer.values
        self.at = At(self.values, self._activations(), training)

    def _activations(self) -> set[Node]:
        """The nodes whose value depends on the inputs, not by their sizes alone."""
        found: set[Node] = set()
        for node in self.graph.nodes:
            depends = node.op in ("placeholder", "call_module") or any(n in found for n in node.all_input_nodes)
            if depends and not isinstance(self.values.get(node), (int, float, torch.Size, torch.dtype, torch.device)):
                found.add(node)
        return found

    def replace(self, names: dict[Key, str]) -> dict[Key, str]:
        """Put calls of modules in the place of functions.

        names: what the other mode has named; empty: names are given here.
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
            if first:
                names[key] = self._free_name(found.name)
            elif key not in names:
                continue
            self.inserted[names[key]] = (found, place)
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
        if found.in_place:
            self._follow_in_place(node, found)
        with self.graph.inserting_before(node):
            called = self.graph.create_node("call_module", name, found.operands, {}, f"{name}_out")
        for known in (self.values, self.tracer.places):
            known[called] = known[node]  # type: ignore[index]
        node.replace_all_uses_with(called)
        self.at.activations.add(called)
        self.graph.erase_node(node)

    def _follow_in_place(self, node: Node, found: Replacement) -> None:
        """Whoever reads the changed tensor afterwards reads the result; Untraceable where that would not be the same."""
        changed = node.args[0]
        assert isinstance(changed, Node)
        tensor = self.values[changed]
        later = set[Node]()
        following = node.next
        while following.op != "root":
            later.add(following)
            following = following.next
        for other in list(self.graph.nodes):
            if other is node or other in later or not _share_memory(self.values.get(other), tensor):
                continue
            value = self.values[other]
            users = [user for user in other.users if user in later]
            same = isinstance(value, Tensor) and value.shape == tensor.shape and value.stride() == tensor.stride()
            if same and other.op not in ("placeholder", "get_attr") and value.data_ptr() == tensor.data_ptr():
                for user in users:
                    user.replace_input_with(other, node)
            elif not found.keeps_in_place and (users or other.op in ("placeholder", "get_attr")):
                own = other.op in ("placeholder", "get_attr")
                what = "a tensor that the block was given or owns" if own else "a tensor of which a part is read later"
                raise Untraceable(f"{node.name} changes {what} in place", self.tracer.places[node])

    def _forget_unused(self) -> None:
        """Remove parts of inputs and outputs that nothing uses."""
        for node in reversed(list(self.graph.nodes)):
            pure = node.target in (getattr, len) or getattr(node.target, "__name__", "") == "getitem"
            if not node.users and (node.op == "get_attr" or node.op == "call_function" and pure):
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
    """An error that a forward raised while it was traced."""
    if isinstance(error, TypeError) and re.search(r"ValueProxy|^\w+\(\) takes \d+ positional", str(error)):
        return "a size is given to a function that takes numbers only; give sizes in a tuple: torch.rand((n, 1))"
    mode = "in training mode " if training else ""
    return f"{mode}{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(value: Any) -> Any:
    return value


def _share_memory(value: Any, tensor: Tensor) -> bool:
    return any(t.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for t in tensors_in(value))


@contextmanager
def _sets_nothing(block: nn.Module) -> Iterator[None]:
    """Raise Untraceable where a forward sets an attribute."""
    attributes = [(module, _attributes(module)) for module in block.modules()]
    yield
    for module, before in attributes:
        for name in _different(before, _attributes(module)):
            owner = "" if module is block else f" of a {type(module).__name__}"
            raise Untraceable(f"its forward sets {name!r}{owner}")


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in set(now) - set(before) - {"training"}:
        del now[name]
    for name, value in before.items():
        if isinstance(value, (dict, list)) and type(now.get(name)) is type(value):
            now[name].clear()
            (now[name].update if isinstance(value, dict) else now[name].extend)(value)
        else:
            now[name] = value


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module; dictionaries and lists as copies."""
    return {k: v.copy() if isinstance(v, (dict, list)) else v for k, v in vars(module).items() if k != "training"}


def _different(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return list(a) == list(b) and all(a[k] is b[k] for k in a)
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
        return a is b

    found = []
    for name in [*before, *(name for name in after if name not in before)]:
        one, two = before.get(name), after.get(name)
        if name in before and name in after and same(one, two):
            continue
        inside = name in ("_buffers", "_parameters", "_modules") and isinstance(one, dict) and isinstance(two, dict)
        found += _different(one, two) if inside else [name]  # type: ignore[arg-type]
    return found


def _untraced(name: str, call: _Call, error: Untraceable) -> TracedBlock:
    where = "" if error.place is None else f" ({spoken(error.place)})"
    return TracedBlock(name, type(call.block).__name__, {}, reason=f"{error}{where}")


def _failure(name: str, call: _Call, error: Untraceable) -> str:
    """What an error says about one block."""
    by_hand: dict[str, list[str]] = {}
    for function, module, place in call.functions:
        where = f"{function} ({spoken(place)})"
        if where not in by_hand.setdefault(module, []):
            by_hand[module].append(where)
    where = "" if error.place is None else f", at {spoken(error.place)}"
    advice = "; ".join(f"{module} for {', '.join(places)}" for module, places in by_hand.items())
    return (
        f"block {name!r} ({type(call.block).__name__}) cannot be traced{where}: {error}. "
        f"Write modules into it by hand instead of functions: {advice}; or leave it as it is with strict=False"
    )


# ---- the proof ----


class _Different(Exception):
    """The traced model does not compute what it did.  ``block``: the one that is to blame; None where none is known."""

    def __init__(self, message: str, block: str | None) -> None:
        super().__init__(message)
        self.block = block


def _compare(before: _Run, outputs: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise _Different where the traced model gives other bits for the example, naming the first block that does."""
    again = _Run(before.model)
    try:
        found = again.run(args, kwargs)
    except Unexpected as error:
        raise _Different(str(error), error.block) from error
    if _equal(outputs, found):
        return
    names = list(before.calls)[::-1]
    differing = [n for n in names if n in again.calls and not _equal(before.calls[n].output, again.calls[n].output)]
    inside = [n for n in differing if not any(o != n and o.startswith(f"{n}." if n else "") for o in differing)]
    block = inside[-1] if inside else None
    where = "the model" if block is None else f"block {block!r}"
    raise _Different(
        f"{where} gives other outputs after tracing, so it was not changed; does its forward keep a state or ask "
        "whether it is being traced? Write its joins by hand (lsquant.nn.Add(), ...)",
        block,
    )


def _compare_doubled(model: nn.Module, outputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise _Different where the traced model does not take twice the batch as it did before."""
    try:
        with _steady(model):
            found = model(*copied(args, _copy), **copied(kwargs, _copy))
    except Unexpected as error:
        raise _Different(f"a block depends on the size of the batch: {error}", error.block) from error
    if not _equal(outputs, found):
        raise _Different("with twice the batch the model gives other outputs after tracing, so it was not changed", None)


def _equal(a: Any, b: Any) -> bool:
    one, two = _flat(a), _flat(b)
    return len(one) == len(two) and all(
        x.shape == y.shape and x.dtype == y.dtype and bool(((x == y) | (x != x) & (y != y)).all())
        for x, y in zip(one, two, strict=True)
    )


def _flat(value: Any) -> list[Tensor]:
    """The tensors in an output, those in the fields of dataclasses too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in _flat(part)]
    return [value] if isinstance(value, Tensor) else []
