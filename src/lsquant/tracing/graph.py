"""A block's forward as a ``torch.fx`` graph.

The forward is run with proxies that carry the values of an example, so that Python's questions about them (how long is
this list? how large is this size?) have answers.  An answer that another input could change is checked in the traced
code.
"""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict as _Dict
from torch.fx.immutable_collections import immutable_list as _List
from torch.fx.node import Node
from torch.fx.proxy import Attribute
from torch.overrides import TorchFunctionMode

from lsquant.tracing.guard import expect, expect_some, keys
from lsquant.tracing.places import Place, Untraceable, current_place, in_library, spoken
from lsquant.tracing.state import state_kept

READS_VALUES = {"item", "tolist", "numpy", "__array__", "is_nonzero", "__bool__", "__int__", "__float__", "__index__"}
"""Methods whose result is no tensor but depends on a tensor's values."""

IN_PLACE_OPERATORS = {
    "__iadd__": (operator.iadd, operator.add),
    "__isub__": (operator.isub, operator.sub),
    "__imul__": (operator.imul, operator.mul),
    "__itruediv__": (operator.itruediv, operator.truediv),
}


class ValueProxy(fx.Proxy):
    """A proxy that knows its value in the example."""

    tracer: BlockTracer

    @property
    def value(self) -> Any:
        return self.tracer.values[self.node]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and not hasattr(Tensor, name):
            raise AttributeError(name)
        self.tracer.require_readable(name, self)
        found = getattr(self.value, name)
        if callable(found) and not isinstance(found, (Tensor, nn.Module)):
            return Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("tracer", "node"):
            vars(self)[name] = value
        else:
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})

    def __bool__(self) -> bool:
        return bool(self.tracer.decided(self, "__bool__", operator.truth))

    def __int__(self) -> int:
        return int(self.tracer.decided(self, "__int__"))

    def __index__(self) -> int:
        known = self.node in self.tracer.checks
        value = int(self.tracer.decided(self, "__index__"))
        if not known:
            self.tracer.asked_by_index(self.node)
        return value

    def __float__(self) -> float:
        return float(self.tracer.decided(self, "__float__"))

    def __len__(self) -> int:
        if isinstance(self.value, Tensor):
            raise Untraceable("len(x) of a tensor is the size of the batch; use x.shape[0]", current_place())
        return self.tracer.decided(self, "__len__", len)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, Tensor):
            raise Untraceable("a loop over a tensor is one over the samples of a batch", current_place())
        if not isinstance(self.value, (tuple, list)):
            raise Untraceable(f"a loop over a {type(self.value).__name__}", current_place())
        return iter(
            [self.tracer.create_proxy("call_function", operator.getitem, (self, i), {}) for i in range(len(self))]
        )

    def __contains__(self, item: Any) -> bool:
        return any(bool(item == one) for one in self)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __hash__(self) -> int:
        return id(self)


def _in_place(method: str) -> Any:
    on_tensors, otherwise = IN_PLACE_OPERATORS[method]

    def operate(self: ValueProxy, other: Any) -> Any:
        function = on_tensors if isinstance(self.value, Tensor) else otherwise
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return operate


for _method in IN_PLACE_OPERATORS:
    setattr(ValueProxy, _method, _in_place(_method))


@contextmanager
def _passing_for_values() -> Iterator[None]:
    """Let ``isinstance(proxy, Tensor)`` be true where the value is a tensor, and so on, for Python code.

    A ``__class__`` that says so would be believed by torch's C++ code too, which would then read memory of no tensor.
    """
    ask = builtins.isinstance

    def isinstance(value: Any, kind: Any) -> bool:
        if type(value) is not ValueProxy:
            return ask(value, kind)
        known = ask(value.tracer.values.get(value.node), kind)
        return known or (in_library(sys._getframe(1)) and ask(value, kind))  # others see no proxy: they run as always

    builtins.isinstance = isinstance  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance = ask


class _Created(TorchFunctionMode):
    """Record calls that no proxy takes part in, such as ``torch.arange(7)``; their result is no constant."""

    def __init__(self, tracer: BlockTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.tracer.running or not isinstance(result, Tensor) or type(result) is ValueProxy:
            return result
        if torch.overrides.is_tensor_method_or_property(func):
            return self.tracer.create_proxy("call_method", func.__name__, args, kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs)


class BlockTracer(fx.Tracer):
    """Trace one block: what it calls are leaves; ``values`` has what each node gave, ``places`` where it stands."""

    proxy_buffer_attributes = True

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__(autowrap_functions=())
        self.submodule_paths: Any = {}
        self.name = name
        self.inputs = (args, kwargs)
        self.values: dict[Node, Any] = {}
        self.places: dict[Node, Place | None] = {}
        self.running = True  # the block's modules compute; False: its own code is traced
        self.definition: Place | None = None  # where the forward begins, before it runs and afterwards
        self.checks: dict[Node, Node] = {}  # what is checked -> its check
        self.asked: list[tuple[Node, Place | None]] = []
        self.containers: list[tuple[Node, Any, Any]] = []  # what the caller gave, as the forward has it, and as it was

    # ---- the run ----

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Run the block's forward, with gradients in training mode.

        Raises: Untraceable, or whatever the forward raises.
        """
        with _passing_for_values(), _Created(self), torch.set_grad_enabled(root.training):
            self.settings = _settings()
            return super().trace(root, concrete_args)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Make a placeholder of each argument, and the containers in it anew with proxies inside."""
        root = self.root
        args, kwargs = self.inputs
        self.running = False
        self.definition = (root_fn.__code__.co_filename, root_fn.__code__.co_firstlineno, 0)
        parameters = inspect.signature(root_fn).parameters
        bound = inspect.signature(root_fn).bind(root, *args, **kwargs).arguments
        positional: list[Any] = [root]
        keywords: dict[str, Any] = {}
        had_default = False
        for place, (name, parameter) in enumerate(parameters.items()):
            if place == 0:
                continue
            kind, default = parameter.kind, parameter.default
            prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(kind, "")
            has_default = default is not parameter.empty
            if kind is parameter.KEYWORD_ONLY and had_default and not has_default:
                raise Untraceable(f"the keyword {name!r} without a default follows arguments that have one")
            had_default = had_default or has_default
            if has_default and not _is_constant(default):
                raise Untraceable(f"the default of argument {name!r} is a {type(default).__name__}")
            node = self.create_node("placeholder", prefix + name, (default,) if has_default else (), {}, name)
            node.meta["keyword_only"] = kind is parameter.KEYWORD_ONLY
            what = f"argument {name!r}"
            if name not in bound and not prefix:
                self.check(node, default, what)  # not given, so the forward takes the default
                continue
            value = bound.get(name, () if prefix == "*" else {})
            if default is None and value is not None:
                self.call(expect_some, (node, self.name, self.describe(what)))
            given = self.given(node, value, what)
            if prefix == "*":
                positional += given
            elif prefix == "**":
                keywords |= given
            elif place <= len(args) and kind is not parameter.KEYWORD_ONLY:
                positional.append(given)  # by position where the call did so, for forwards with decorators
            else:
                keywords[name] = given

        def call():  # an annotation would be copied into the traced code
            definition, self.definition = self.definition, None
            result = root_fn(*positional, **keywords)
            self.definition = definition
            self.set_items()
            return result

        return call, []

    def given(self, node: Node, value: Any, what: str) -> Any:
        """Return what the forward gets for an argument, or for a part of one."""
        if value is None or isinstance(value, (bool, str)):
            self.check(node, value, what)
            return value
        self.values[node] = value
        return self.unpacked(self.proxy(node), what, is_argument=True)

    def unpacked(self, proxy: Any, what: str, is_argument: bool = False) -> Any:
        """Return proxies for the parts of tuples, lists and mappings, in real ones; else the proxy itself."""
        value: Any = proxy.value
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            if is_argument:
                self.check(self.call(len, (proxy.node,)), len(value), f"the length of {what}")
            parts = [self.given(self.call(operator.getitem, (proxy.node, i)), v, what) for i, v in enumerate(value)]
            if isinstance(value, list):
                if is_argument:
                    self.containers.append((proxy.node, parts, parts.copy()))
                return parts
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, dict) and type(value) in (dict, OrderedDict):
            if is_argument:
                self.check(self.call(keys, (proxy.node,)), keys(value), f"the keys of {what}")
            parts = {k: self.given(self.call(operator.getitem, (proxy.node, k)), v, what) for k, v in value.items()}
            made = type(value)(parts)
            if is_argument:
                self.containers.append((proxy.node, made, made.copy()))
            return made
        return proxy

    def set_items(self) -> None:
        """Change the lists and dictionaries of the caller where the forward did."""
        for node, now, before in self.containers:
            places = list(now) if isinstance(now, dict) else list(range(len(now)))
            if len(now) < len(before) or (isinstance(now, list) and len(now) != len(before)):
                raise Untraceable("its forward appends to or removes from a container that it was given")
            for place in places:
                if (isinstance(now, list) or place in before) and now[place] is before[place]:
                    continue
                self.call(operator.setitem, (node, place, self.create_arg(now[place])))

    def here(self) -> Place | None:
        """Return what is being executed in the block."""
        return self.definition or current_place()

    def call(self, function: Any, args: tuple[Any, ...]) -> Node:
        """Return a node that calls a function; its value is not computed."""
        return self.create_node("call_function", function, args, {})

    # ---- what is recorded ----

    def proxy(self, node: Node) -> Any:
        return ValueProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        self.places[node] = self.here()
        if node.op == "get_attr":
            with self.computing():
                self.values[node] = _attribute(self.root, str(node.target))
        if not self.running and node.op != "output" and _settings() != self.settings:
            raise Untraceable("a context such as torch.no_grad() or torch.autocast()", self.places[node])
        return node

    def create_arg(self, a: Any) -> Any:
        if type(a) in (ValueProxy, Attribute):
            return a.node
        if isinstance(a, Tensor) and not any(a is own for own in self._own_tensors()):
            raise Untraceable("a tensor that is no parameter or buffer of the block", self.here())
        if isinstance(a, nn.Module):
            raise Untraceable("a module is given to a function", self.here())
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            parts = {field.name: self.create_arg(getattr(a, field.name)) for field in dataclasses.fields(a)}
            return self._made(type(a), (), parts)
        if isinstance(a, dict) and type(a) is OrderedDict:
            return self._made(OrderedDict, ({k: self.create_arg(v) for k, v in a.items()},), {})
        if isinstance(a, (dict, list)) and type(a) not in (dict, list, _Dict, _List):
            raise Untraceable(f"a {type(a).__name__} is made", self.here())
        return super().create_arg(a)

    def _made(self, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """Return a node that makes an object."""
        node = self.create_node("call_function", kind, args, kwargs)
        self.values[node] = kind(*self._concrete(args), **self._concrete(kwargs))
        return node

    def _own_tensors(self) -> Iterator[Tensor]:
        yield from self.root.parameters()
        yield from self.root.buffers()
        yield from (tensor for tensor in self.tensor_attrs if isinstance(tensor, Tensor))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.running:
            return forward(*args, **kwargs)
        if m not in self.submodule_paths and not [*m.parameters(), *m.buffers()]:
            return forward(*args, **kwargs)  # made in the forward, or kept elsewhere: a function
        try:
            return super().call_module(m, forward, args, kwargs)
        except NameError as error:
            reason = f"it calls a {type(m).__name__} that is not one of its own modules"
            raise Untraceable(reason, self.here()) from error

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
        *_: Any,
        **__: Any,
    ) -> Any:
        """Record a node and compute its value, with the values of its arguments."""
        if kind == "call_method":
            self.require_readable(target, args[0])
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr)
        node = proxy.node
        self._take_back_checks(node)
        with self.computing():
            self.values[node] = self._value(kind, target, self._concrete(node.args), self._concrete(node.kwargs))
        value = self.values[node]
        if kind in ("call_function", "call_method") and isinstance(value, Iterator):
            raise Untraceable(f"{node.name} gives a {type(value).__name__}", self.places[node])
        what = f"what {target if isinstance(target, str) else target.__name__} gives"
        return self.unpacked(proxy, what)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Record nothing: modules and functions compute values."""
        running, self.running = self.running, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.running = running

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_module":
            module = self.root.get_submodule(target)
            with state_kept(module):
                return module(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if kind == "get_attr":
            return _attribute(self.root, target)
        return target(*args, **kwargs)

    def _concrete(self, arguments: Any) -> Any:
        """Return the values of a node's arguments; lists and dictionaries are fresh ones."""

        def value(a: Any) -> Any:
            if isinstance(a, slice):
                return slice(value(a.start), value(a.stop), value(a.step))
            return self.values[a] if isinstance(a, Node) else a

        return copied(arguments, value)

    # ---- what Python wants to know ----

    def decided(self, proxy: ValueProxy, method: str, function: Any = None) -> Any:
        """Return a plain value for Python; the traced code checks that it is still the same.  Never one of a tensor."""
        self.require_readable(method, proxy)
        node = proxy.node
        value = proxy.value
        if function is not None:
            node, value = self.call(function, (node,)), function(value)
        elif not isinstance(value, (int, float)):
            raise Untraceable(f"a number is made of a {type(value).__name__}", self.here())
        self.check(node, value, "a branch or a number that depends on a size")
        return value

    def require_readable(self, name: str, proxy: Any) -> None:
        """Raise Untraceable where a tensor's values would decide what Python does."""
        if name in READS_VALUES and type(proxy) is ValueProxy and isinstance(proxy.value, Tensor):
            what = "decide a branch" if name == "__bool__" else f"become a number or an array ({name.strip('_')})"
            raise Untraceable(f"the values of a tensor {what}", self.here())

    def check(self, node: Node, value: Any, what: str) -> None:
        """Let the traced code raise where a node has another value than now."""
        self.values[node] = value
        if node not in self.checks:
            self.checks[node] = self.call(expect, (node, value, self.name, self.describe(what)))

    def describe(self, what: str) -> str:
        """Return what a check is about, for its message."""
        return f"block {self.name!r} ({spoken(self.here())}), {what}"

    def asked_by_index(self, node: Node) -> None:
        """Note that ``__index__`` gave a number away: torch asks so when it looks whether an argument is an integer."""
        self.asked.append((node, self.here()))

    def _take_back_checks(self, node: Node) -> None:
        """Remove the checks of numbers that only this very call asked for: it gets the numbers themselves."""
        for number, place in self.asked:
            if number in node.all_input_nodes and place == self.places[node] and number in self.checks:
                self.graph.erase_node(self.checks.pop(number))
        self.asked.clear()


def copied(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return tuples, lists and dictionaries anew, with everything else in them changed."""
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        parts = [copied(v, change) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, (list, dict)) and type(value) in (list, dict, OrderedDict, _List, _Dict):
        if isinstance(value, list):
            return [copied(v, change) for v in value]
        return (OrderedDict if type(value) is OrderedDict else dict)((k, copied(v, change)) for k, v in value.items())
    return change(value)


def _settings() -> tuple[Any, ...]:
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _is_constant(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (type(value) is tuple and all(map(_is_constant, value)))
    )


def _attribute(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)
