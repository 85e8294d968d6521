"""A block's new forward: graphs become source, source becomes a subclass of the block's class, and the block gets it.

The class is made from values that can be pickled (``Code``), so that copies and pickles of a traced block are traced.
"""

from __future__ import annotations

import copyreg
import importlib
import linecache
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import fx, nn

from lsquant.tracing.functions import Replacement

_MODES = ("_traced_evaluation", "_traced_training")
_CLASSES: dict[tuple[type, Code], type] = {}


@dataclass(frozen=True)
class Code:
    """What a traced forward consists of.

    source: one function ``forward``, or one for each mode beside it.
    names: global name -> what it stands for in the source; a module as its name.
    moved: name of a parameter of the block -> the module in which it is now, and its name there.
    """

    source: str
    names: tuple[tuple[str, Any], ...]
    moved: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class _Module:
    """A Python module in ``Code.names``; modules cannot be pickled."""

    name: str


# ---- from graphs to source ----


def code_of(evaluation: fx.Graph, training: fx.Graph, moved: tuple[tuple[str, str, str], ...]) -> Code:
    """Write the forward of a block, as two functions where the modes differ."""
    sources, names = [], dict[str, Any]()
    for graph in (evaluation, training):
        made = graph.python_code("self")
        sources.append(made.src.strip() + "\n")
        for name, value in made.globals.items():
            names[name] = _Module(value.__name__) if isinstance(value, ModuleType) else value
    source = sources[0]
    if sources[0] != sources[1]:
        header = re.match(r"def forward\((.*)\)(?: -> .*)?:\n", source)
        assert header is not None
        given = ", ".join(_argument(node) for node in evaluation.nodes if node.op == "placeholder")
        source = (
            _renamed(sources[0], _MODES[0])
            + _renamed(sources[1], _MODES[1])
            + f"def forward({header[1]}):\n    if self.training:\n        return self._traced_training({given})\n"
            + f"    return self._traced_evaluation({given})\n"
        )
    used = set(re.findall(r"\w+", source))
    return Code(source, tuple((name, names[name]) for name in sorted(used & set(names))), moved)


def _renamed(source: str, name: str) -> str:
    return source.replace("def forward(", f"def {name}(", 1)


def _argument(node: fx.Node) -> str:
    """Say how an argument is given on; by position, or by name where that is the only way."""
    target = str(node.target)
    return f"{target}={target}" if node.meta.get("keyword_only") else target


# ---- from source to a class ----


def traced_class(base: type, code: Code) -> type:
    """Return the subclass of a block's class with the traced forward; one for equal code."""
    if (found := _CLASSES.get((base, code))) is None:
        body: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        body |= _compiled(base, code)
        body |= {name: _moved_parameter(*place) for name, *place in code.moved}
        found = _CLASSES[base, code] = type(base)(base.__name__, (base,), body)
        _add_methods(found, base, code)
    return found


def _compiled(base: type, code: Code) -> dict[str, Any]:
    """Run the source, with a file name under which debuggers and tracebacks find it."""
    names: dict[str, Any] = {
        name: importlib.import_module(value.name) if isinstance(value, _Module) else value for name, value in code.names
    }
    file = f"<lsquant.trace {base.__qualname__} {len(_CLASSES) + 1}>"
    linecache.cache[file] = (len(code.source), None, code.source.splitlines(keepends=True), file)
    exec(compile(code.source, file, "exec"), names)  # without a "__name__", in whose module torch.compile would look
    functions = {name: names[name] for name in ("forward", *_MODES) if name in names}
    for function in functions.values():
        function.__module__ = base.__module__
    return functions


def _blank(base: type, code: Code) -> nn.Module:
    """Return an object of a traced class that has no attributes yet: copies and pickles begin so."""
    kind: Any = traced_class(base, code)
    return kind.__new__(kind)


def _moved_parameter(module: str, name: str) -> property:
    """Return the attribute of a block that gives a parameter which lies in one of its modules now."""
    return property(lambda self: getattr(getattr(self, module), name))


def _add_methods(kind: Any, base: Any, code: Code) -> None:
    """Let objects of a traced class be copied and pickled, and load states with the keys from before tracing."""

    def reduce_ex(self: Any, protocol: Any) -> Any:
        made, args, *state = super(kind, self).__reduce_ex__(max(int(protocol), 2))
        if made is copyreg.__newobj__ and args == (kind,):  # type: ignore[attr-defined]
            return (_blank, (base, code), *state)
        return (made, args, *state)

    def load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
        for name, module, inner in code.moved:
            if prefix + name in state_dict:
                state_dict.setdefault(f"{prefix}{module}.{inner}", state_dict.pop(prefix + name))
        super(kind, self)._load_from_state_dict(state_dict, prefix, *args)

    kind.__reduce_ex__ = reduce_ex
    if code.moved:
        kind._load_from_state_dict = load_from_state_dict


# ---- the exchange ----


@dataclass
class Plan:
    """What a block becomes.

    modules: name -> module to be, in order.
    places: name -> where the function stood.
    """

    block: nn.Module
    kind: type
    modules: dict[str, Replacement]
    moved: tuple[tuple[str, str, str], ...]


def apply(plan: Plan) -> None:
    """Give a block its new modules and its new class."""
    block = plan.block
    for name, replacement in plan.modules.items():
        module = _made(block, replacement)
        block.add_module(name, module.train(block.training))
    for parameter, _, _ in plan.moved:
        del block._parameters[parameter]
    block.__class__ = plan.kind


def undo(plan: Plan, before: tuple[type, dict[str, Any]]) -> None:
    """Give a block its class and parameters back, and take the new modules away."""
    block = plan.block
    block.__class__, parameters = before
    block._parameters.clear()
    block._parameters.update(parameters)
    for name in plan.modules:
        block._modules.pop(name, None)


def _made(block: nn.Module, replacement: Replacement) -> nn.Module:
    if not replacement.parameters:
        return replacement.kind(*replacement.args, **replacement.kwargs)
    module = replacement.kind(*replacement.args, **replacement.kwargs, device="meta")  # draws no random numbers
    for name, own in replacement.parameters.items():
        module.register_parameter(name, block._parameters[own])
    return module
