"""Which function becomes which module.

Each function below has the arguments of the function of torch that it stands for, and returns the module that
computes the same, or None where that function is not to be replaced.  ``at`` is what is known about the call.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import Node
from torch.nn import functional as F

from lsquant.nn.functions import Chunk, Clip, Mean, Resize, Slice, Split
from lsquant.nn.joins import Add, Cat, Mul


@dataclass(frozen=True)
class Replacement:
    """A module to be, and what it is called with.

    name: what it is called in its block.
    kind, args, kwargs: how it is made.
    operands: the nodes it is called with.
    parameters: name in the new module -> name of the block's own parameter, which moves there.
    in_place: the function changes its first operand.
    """

    name: str
    kind: type[nn.Module]
    args: tuple[Any, ...]
    operands: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    in_place: bool = False

    @property
    def spoken(self) -> str:
        """How it is made, in words; equal for equal modules."""
        given = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs.items()]
        return f"{self.kind.__name__}({', '.join(given)})" + str(sorted(self.parameters.items()) or "")

    @property
    def keeps_in_place(self) -> bool:
        """Whether the module changes its operand too."""
        return self.in_place and bool(self.kwargs.get("inplace"))


@dataclass(frozen=True)
class At:
    """What is known about one call.

    values: the value of each node in the example.
    activations: nodes whose value depends on the block's inputs.
    training: the mode of this trace.
    """

    values: dict[Node, Any]
    activations: set[Node]
    training: bool

    def is_activation(self, *nodes: Any) -> bool:
        """Tell whether all are floating-point tensors that depend on the inputs."""
        return all(
            isinstance(n, Node)
            and n in self.activations
            and isinstance(self.values.get(n), Tensor)
            and self.values[n].is_floating_point()
            for n in nodes
        )

    def tensor(self, node: Node) -> Tensor:
        return self.values[node]


Rule = Callable[..., Replacement | None]
FUNCTIONS: dict[Any, Rule] = {}
METHODS: dict[str, Rule] = {}
SUGGESTIONS: dict[str, str] = {}
"""Name of a function -> the module to write by hand, for messages."""


def _rule(*functions: Any, methods: str = "", hand: str) -> Callable[[Rule], Rule]:
    """Enter a rule: for functions of torch, for methods of tensors; ``hand`` is what to write instead."""

    def enter(rule: Rule) -> Rule:
        FUNCTIONS.update(dict.fromkeys(functions, rule))
        METHODS.update(dict.fromkeys(methods.split(), rule))
        names = [f.__name__ for f in functions] + methods.split()
        SUGGESTIONS.update(dict.fromkeys((n.strip("_") for n in names), hand))
        return rule

    return enter


def replacement(node: Node, at: At) -> Replacement | None:
    """Return the module for a node; None where it stays what it is."""
    if node.op not in ("call_function", "call_method"):
        return None
    rules: Any = FUNCTIONS if node.op == "call_function" else METHODS
    rule = rules.get(node.target)
    if rule is None:
        return None
    try:
        return rule(at, *node.args, **node.kwargs)
    except TypeError:  # an argument that the rule does not know
        return None


def _static(value: Any) -> bool:
    """Tell whether a value holds no node."""
    if isinstance(value, Node):
        return False
    if isinstance(value, slice):
        return _static((value.start, value.stop, value.step))
    return all(map(_static, value)) if isinstance(value, (tuple, list)) else True


def _plain(value: Any) -> Any:
    """Return lists of torch.fx as tuples."""
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _dims(dim: Any, ndim: int) -> tuple[int, ...]:
    return tuple(d % ndim for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))


# ---- joins ----


def _joining(name: str, kind: type[nn.Module], in_place: bool = False) -> Rule:
    def rule(at: At, input: Any, other: Any, *, alpha: Any = 1, out: Any = None) -> Replacement | None:
        if not at.is_activation(input, other) or alpha != 1 or out is not None:
            return None
        if in_place and at.tensor(input).dtype != torch.result_type(at.tensor(input), at.tensor(other)):
            return None
        return Replacement(name, kind, (), (input, other), in_place=in_place)

    return rule


_rule(operator.add, torch.add, methods="add", hand="lsquant.nn.Add()")(_joining("add", Add))
_rule(operator.iadd, methods="add_", hand="lsquant.nn.Add()")(_joining("add", Add, True))
_rule(operator.mul, torch.mul, torch.multiply, methods="mul multiply", hand="lsquant.nn.Mul()")(_joining("mul", Mul))
_rule(operator.imul, methods="mul_ multiply_", hand="lsquant.nn.Mul()")(_joining("mul", Mul, True))


@_rule(torch.cat, torch.concat, torch.concatenate, hand="lsquant.nn.Cat()")
def _cat(at: At, tensors: Any, dim: Any = 0, *, axis: Any = None, out: Any = None) -> Replacement | None:
    dim = dim if axis is None else axis
    if not isinstance(tensors, (tuple, list)) or not at.is_activation(*tensors) or out is not None:
        return None
    if not isinstance(dim, int) or dim % at.tensor(tensors[0]).ndim == 0:
        return None
    return Replacement("cat", Cat, (dim,), tuple(tensors))


# ---- elementwise functions ----


def _elementwise(
    name: str, kind: type[nn.Module], functions: tuple[Any, ...], methods: str = "", options: str = "", keys: str = ""
) -> None:
    """Enter a function with one operand; its options, by position or name, are the module's, by the names in keys."""
    names = options.split()
    takes_inplace = "inplace" in inspect.signature(kind).parameters
    module_names = dict(zip(names, (keys or options).split(), strict=True))

    def rule(at: At, input: Any, *given: Any, inplace: Any = False, **named: Any) -> Replacement | None:
        values = dict(zip([*names, "inplace"], given, strict=False)) | named
        inplace = values.pop("inplace", inplace)
        if not at.is_activation(input) or not _static(list(values.values())):
            return None
        if len(given) > len(names) + 1 or not set(values) <= set(names):
            return None
        kwargs = {module_names[n]: v for n, v in values.items()}
        if inplace and takes_inplace:
            kwargs["inplace"] = True
        return Replacement(name, kind, (), (input,), kwargs, in_place=bool(inplace))

    def changing(at: At, input: Any, *given: Any, **named: Any) -> Replacement | None:
        return rule(at, input, *given, inplace=True, **named)

    hand = f"torch.nn.{kind.__name__}()"
    _rule(*functions, methods=methods, hand=hand)(rule)
    in_place = [getattr(home, f"{name}_") for home in (F, torch) if hasattr(home, f"{name}_")]
    _rule(*in_place, methods=" ".join(f"{method}_" for method in methods.split()), hand=hand)(changing)


_elementwise("relu", nn.ReLU, (F.relu, torch.relu), "relu")
_elementwise("relu6", nn.ReLU6, (F.relu6,))
_elementwise("hardtanh", nn.Hardtanh, (F.hardtanh,), "", "min_val max_val")
_elementwise("leaky_relu", nn.LeakyReLU, (F.leaky_relu,), "", "negative_slope")
_elementwise("elu", nn.ELU, (F.elu,), "", "alpha")
_elementwise("silu", nn.SiLU, (F.silu,))
_elementwise("mish", nn.Mish, (F.mish,))
_elementwise("hardswish", nn.Hardswish, (F.hardswish,))
_elementwise("hardsigmoid", nn.Hardsigmoid, (F.hardsigmoid,))
_elementwise("gelu", nn.GELU, (F.gelu,), "", "approximate")
_elementwise("sigmoid", nn.Sigmoid, (F.sigmoid, torch.sigmoid), "sigmoid")
_elementwise("tanh", nn.Tanh, (F.tanh, torch.tanh), "tanh")


def _clip(at: At, input: Any, low: Any, high: Any, in_place: bool = False) -> Replacement | None:
    numbers = [b for b in (low, high) if b is not None]
    if not at.is_activation(input) or not numbers or not all(isinstance(b, (int, float)) for b in numbers):
        return None
    return Replacement("clip", Clip, (low, high), (input,), in_place=in_place)


@_rule(torch.clamp, torch.clip, methods="clamp clip", hand="lsquant.nn.Clip(min, max)")
def _clamp(at: At, input: Any, min: Any = None, max: Any = None) -> Replacement | None:
    return _clip(at, input, min, max)


@_rule(torch.clamp_, torch.clip_, methods="clamp_ clip_", hand="lsquant.nn.Clip(min, max)")
def _clamp_in_place(at: At, input: Any, min: Any = None, max: Any = None) -> Replacement | None:
    return _clip(at, input, min, max, in_place=True)


@_rule(torch.clamp_min, methods="clamp_min", hand="lsquant.nn.Clip(min, max)")
def _clamp_min(at: At, input: Any, min: Any) -> Replacement | None:
    return _clip(at, input, min, None)


@_rule(torch.clamp_max, methods="clamp_max", hand="lsquant.nn.Clip(min, max)")
def _clamp_max(at: At, input: Any, max: Any) -> Replacement | None:
    return _clip(at, input, None, max)


def _dropout(kind: type[nn.Module]) -> Rule:
    def rule(at: At, input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> Replacement | None:
        if not at.is_activation(input) or not isinstance(p, (int, float)) or training is not at.training:
            return None
        kwargs = {"inplace": True} if inplace else {}
        return Replacement("dropout", kind, (p,), (input,), kwargs, in_place=bool(inplace))

    return rule


for _function, _kind in (
    (F.dropout, nn.Dropout), (F.dropout1d, nn.Dropout1d), (F.dropout2d, nn.Dropout2d), (F.dropout3d, nn.Dropout3d),
):  # fmt: skip
    _rule(_function, hand=f"torch.nn.{_kind.__name__}(p)")(_dropout(_kind))


# ---- pooling and means ----


def _max_pool(kind: type[nn.Module]) -> Rule:
    def rule(
        at: At, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: Any = False, return_indices: Any = False,
    ) -> Replacement | None:  # fmt: skip
        options = kernel_size, stride or None, padding, dilation
        if not at.is_activation(input) or not _static(options) or return_indices:
            return None
        kernel_size, stride, padding, dilation = map(_plain, options)
        kwargs = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
        return Replacement("max_pool", kind, (kernel_size,), (input,), kwargs)

    return rule


def _avg_pool(kind: type[nn.Module]) -> Rule:
    def rule(
        at: At, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: Any = False,
        count_include_pad: Any = True, divisor_override: Any = None,
    ) -> Replacement | None:  # fmt: skip
        options = kernel_size, stride or None, padding, divisor_override
        if not at.is_activation(input) or not _static(options):
            return None
        kernel_size, stride, padding, divisor_override = map(_plain, options)
        kwargs = {"stride": stride, "padding": padding, "ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
        if divisor_override is not None:
            kwargs["divisor_override"] = divisor_override
        return Replacement("avg_pool", kind, (kernel_size,), (input,), kwargs)

    return rule


def _adaptive_pool(name: str, kind: type[nn.Module]) -> Rule:
    def rule(at: At, input: Any, output_size: Any, return_indices: Any = False) -> Replacement | None:
        if not at.is_activation(input) or not _static(output_size) or return_indices:
            return None
        return Replacement(name, kind, (_plain(output_size),), (input,))

    return rule


for _d in (1, 2, 3):
    _max, _avg = getattr(nn, f"MaxPool{_d}d"), getattr(nn, f"AvgPool{_d}d")
    _rule(getattr(F, f"max_pool{_d}d"), getattr(torch, f"max_pool{_d}d"), hand=f"torch.nn.{_max.__name__}(...)")(
        _max_pool(_max)
    )
    _rule(getattr(F, f"avg_pool{_d}d"), hand=f"torch.nn.{_avg.__name__}(...)")(_avg_pool(_avg))
    for _name in ("max", "avg"):
        _kind = getattr(nn, f"Adaptive{_name.title()}Pool{_d}d")
        _rule(getattr(F, f"adaptive_{_name}_pool{_d}d"), hand=f"torch.nn.{_kind.__name__}(size)")(
            _adaptive_pool(f"{_name}_pool", _kind)
        )


@_rule(torch.mean, methods="mean", hand="lsquant.nn.Mean((2, 3))")
def _mean(at: At, input: Any, dim: Any = None, keepdim: Any = False, *, axis: Any = None) -> Replacement | None:
    dim = dim if axis is None else axis
    if not at.is_activation(input) or dim is None or not _static((dim, keepdim)):
        return None
    ndim = at.tensor(input).ndim
    if ndim < 4 or sorted(_dims(dim, ndim)) != list(range(2, ndim)):
        return None
    return Replacement("mean", Mean, (_dims(dim, ndim),), (input,), {"keepdim": True} if keepdim else {})


# ---- shapes ----


def _is_batch_size(at: At, size: Any) -> bool:
    """Tell whether a node is the size of an activation's first dimension."""
    if not isinstance(size, Node):
        return False
    if size.op == "call_method" and size.target == "size" and size.args[1:] == (0,):
        return size.args[0] in at.activations
    if size.op != "call_function" or size.target is not operator.getitem or size.args[1] != 0:
        return False
    shape = size.args[0]
    if not isinstance(shape, Node) or not isinstance(at.values.get(shape), torch.Size):
        return False
    return shape.args[0] in at.activations and shape.target in ("size", getattr)


@_rule(torch.flatten, methods="flatten", hand="torch.nn.Flatten()")
def _flatten(at: At, input: Any, start_dim: Any = 0, end_dim: Any = -1) -> Replacement | None:
    if not at.is_activation(input) or not isinstance(start_dim, int) or not isinstance(end_dim, int):
        return None
    if start_dim % at.tensor(input).ndim == 0:
        return None
    return Replacement("flatten", nn.Flatten, () if (start_dim, end_dim) == (1, -1) else (start_dim, end_dim), (input,))


@_rule(torch.reshape, methods="view reshape", hand="torch.nn.Flatten()")
def _reshape(at: At, input: Any, *size: Any, shape: Any = None) -> Replacement | None:
    if shape is not None:
        size = shape
    elif len(size) == 1 and isinstance(size[0], (tuple, list)):
        size = tuple(size[0])
    if not at.is_activation(input) or len(size) != 2:
        return None
    x = at.tensor(input)
    rest = x[:1].numel()
    first, second = size
    is_batch = _is_batch_size(at, first) and at.values[first] == len(x)
    whole = (is_batch and second in (-1, rest)) or (first == -1 and second == rest)
    return Replacement("flatten", nn.Flatten, (), (input,)) if whole and x.ndim > 1 else None


@_rule(F.pad, hand="torch.nn.ZeroPad2d(...)")
def _pad(at: At, input: Any, pad: Any, mode: Any = "constant", value: Any = None) -> Replacement | None:
    value = 0.0 if value is None else value
    if not at.is_activation(input) or mode != "constant" or not _static((pad, value)) or len(pad) not in (2, 4, 6):
        return None
    pad = tuple(pad)
    if len(pad) == 4 and value == 0:
        return Replacement("pad", nn.ZeroPad2d, (pad,), (input,))
    kind = {2: nn.ConstantPad1d, 4: nn.ConstantPad2d, 6: nn.ConstantPad3d}[len(pad)]
    return Replacement("pad", kind, (pad, value), (input,))


@_rule(operator.getitem, hand="lsquant.nn.Slice(...)")
def _getitem(at: At, input: Any, index: Any) -> Replacement | None:
    if not at.is_activation(input) or not _static(index):
        return None
    index = tuple(index) if isinstance(index, (tuple, list)) else (index,)
    known = all(isinstance(i, (slice, int, EllipsisType)) and not isinstance(i, bool) for i in index)
    whole_batch = index[:1] == (slice(None),) or (index[:1] == (...,) and len(index) <= at.tensor(input).ndim)
    if not known or not whole_batch or all(i in (slice(None), ...) for i in index):
        return None
    return Replacement("slice", Slice, index, (input,))


@_rule(torch.narrow, methods="narrow", hand="lsquant.nn.Slice(...)")
def _narrow(at: At, input: Any, dim: Any, start: Any, length: Any) -> Replacement | None:
    if not at.is_activation(input) or not all(isinstance(v, int) for v in (dim, start, length)):
        return None
    ndim = at.tensor(input).ndim
    if dim % ndim == 0 or start < 0:
        return None
    index = (*[slice(None)] * (dim % ndim), slice(start, start + length))
    return Replacement("slice", Slice, index, (input,))


@_rule(torch.chunk, methods="chunk", hand="lsquant.nn.Chunk(n)")
def _chunk(at: At, input: Any, chunks: Any, dim: Any = 0) -> Replacement | None:
    if not at.is_activation(input) or not _static((chunks, dim)) or dim % at.tensor(input).ndim == 0:
        return None
    return Replacement("chunk", Chunk, (chunks, dim), (input,))


@_rule(torch.split, methods="split", hand="lsquant.nn.Split(sizes)")
def _split(
    at: At, tensor: Any, split_size_or_sections: Any = None, dim: Any = 0, *, split_size: Any = None
) -> Replacement | None:
    sizes = split_size_or_sections if split_size is None else split_size
    if not at.is_activation(tensor) or sizes is None or not _static((sizes, dim)):
        return None
    if dim % at.tensor(tensor).ndim == 0:
        return None
    return Replacement("split", Split, (_plain(sizes), dim), (tensor,))


@_rule(F.interpolate, hand="torch.nn.Upsample(scale_factor=2)")
def _interpolate(
    at: At, input: Any, size: Any = None, scale_factor: Any = None, mode: Any = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: Any = False,
) -> Replacement | None:  # fmt: skip
    if not at.is_activation(input) or mode != "nearest" or antialias or recompute_scale_factor:
        return None
    if size is not None and not _static(size):
        return Replacement("upsample", Resize, (), (input, size))
    if not _static(scale_factor):
        return None
    name, value = ("scale_factor", scale_factor) if size is None else ("size", size)
    return Replacement("upsample", nn.Upsample, (), (input,), {name: _plain(value)})


# ---- layers by function ----


def _own_parameters(at: At, weight: Any, bias: Any) -> dict[str, str] | None:
    """Return the block's own parameters that only this function uses, as weight and bias; None where not so."""
    found = {}
    for name, node in (("weight", weight), ("bias", bias)):
        if node is None and name == "bias":
            continue
        if not isinstance(node, Node) or node.op != "get_attr" or "." in str(node.target) or len(node.users) != 1:
            return None
        if not isinstance(at.values[node], nn.Parameter):
            return None
        found[name] = str(node.target)
    return found


@_rule(F.linear, hand="torch.nn.Linear(...)")
def _linear(at: At, input: Any, weight: Any, bias: Any = None) -> Replacement | None:
    own = _own_parameters(at, weight, bias)
    if not at.is_activation(input) or own is None or at.tensor(weight).ndim != 2:
        return None
    outputs, inputs = at.tensor(weight).shape
    return Replacement("linear", nn.Linear, (inputs, outputs), (input,), {"bias": bias is not None}, own)


def _conv(kind: type[nn.Module]) -> Rule:
    def rule(
        at: At, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: Any = 1,
    ) -> Replacement | None:  # fmt: skip
        own = _own_parameters(at, weight, bias)
        if not at.is_activation(input) or own is None or not _static((stride, padding, dilation, groups)):
            return None
        outputs, inputs, *kernel = at.tensor(weight).shape
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        kwargs = {name: _plain(value) for name, value in options.items()} | {"bias": bias is not None}
        return Replacement("conv", kind, (inputs * groups, outputs, tuple(kernel)), (input,), kwargs, own)

    return rule


for _d, _kind in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
    _rule(getattr(F, f"conv{_d}d"), hand=f"torch.nn.{_kind.__name__}(...)")(_conv(_kind))
