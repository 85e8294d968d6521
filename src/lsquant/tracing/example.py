"""Runs of a model on an example: what each block is called with and uses, and whether two runs gave the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lsquant._util.batches import evaluating
from lsquant._util.nested import tensors_in
from lsquant.nn import quantized_type
from lsquant.tracing.functions import SUGGESTIONS
from lsquant.tracing.graph import copied
from lsquant.tracing.places import Place, current_place
from lsquant.tracing.state import state_kept

_LEAVES = ("torch.", "lsquant.nn.", "lsquant.quantizer", "lsquant.shipped.")
"""Where the forwards are that are never looked into."""


@dataclass
class Call:
    """The first call of a block.

    functions: (what is called, what to write instead, place) of the functions it uses.
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    functions: list[tuple[str, str, Place | None]] = field(default_factory=list)
    output: Any = None


def is_block(module: nn.Module) -> bool:
    """Tell whether a module has a forward in Python that is not torch's or lsquant's, and is no known layer."""
    if isinstance(module, torch.jit.ScriptModule) or quantized_type(module) is not None:
        return False
    forward = type(module).forward
    home = getattr(forward, "__module__", None) or ""
    return not home.startswith(_LEAVES) and hasattr(forward, "__code__")


class Run(TorchFunctionMode):
    """A run of the model that keeps the first call of each block, and the functions that the block itself uses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: dict[str, Call] = {}
        self.stack: list[Call | None] = []

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        hooks = []
        for name, module in self.model.named_modules():
            hooks.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leaving(name), always_call=True))
        try:
            with self:
                return output(self.model, args, kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if is_block(module) and name not in self.calls:
                self.calls[name] = Call(module, copied(args, _same), copied(kwargs, _same))
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
        result = func(*args, **(kwargs or {}))
        if call is not None and name in SUGGESTIONS and _may_become_module(name, args, result):
            call.functions.append((name, SUGGESTIONS[name], current_place()))
        return result


def _may_become_module(name: str, args: tuple[Any, ...], result: Any) -> bool:
    """Tell whether a function is one that tracing may replace, as far as one call shows."""
    given = [t for t in tensors_in(list(args)) if t.is_floating_point() and not isinstance(t, nn.Parameter)]
    if not given:
        return False
    before, after = given[0].ndim, result.ndim if isinstance(result, Tensor) else 0
    if name in ("add", "iadd", "mul", "imul", "multiply"):
        return len(given) > 1
    if name == "mean":
        return before > 3 and after > 0
    if name in ("view", "reshape"):
        return before > 2 and after == 2
    return name != "getitem" or (len(args) > 1 and isinstance(args[1], (tuple, EllipsisType)))


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Hold eval mode and the same random numbers; modes, attributes, buffers and generators are put back."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with state_kept(model), evaluating(model), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def output(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what the model gives; nothing of it or of its inputs changes."""
    with steady(model):
        return model(*copied(args, fresh), **copied(kwargs, fresh))


def output_or_none(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what the model gives; None where it raises."""
    try:
        return output(model, args, kwargs)
    except Exception:  # noqa: BLE001  (a model that takes one batch size only)
        return None


def doubled(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Return the example twice along the batch; None where there is no batch."""
    tensors = [t for t in tensors_in([args, dict(kwargs)]) if t.ndim]
    if not tensors or not len(tensors[0]):
        return None
    size = len(tensors[0])

    def twice(value: Any) -> Any:
        return torch.cat((value, value)) if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    return copied(args, twice), copied(dict(kwargs), twice)


def fresh(value: Any) -> Any:
    """Return a copy of a tensor; anything else itself."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(value: Any) -> Any:
    return value


def equal(a: Any, b: Any) -> bool:
    """Tell whether two outputs have the same tensors, bit for bit; NaN equals NaN."""
    one, two = _flat(a), _flat(b)
    return len(one) == len(two) and all(
        x.shape == y.shape and x.dtype == y.dtype and bool(((x == y) | (x != x) & (y != y)).all())
        for x, y in zip(one, two, strict=True)
    )


def _flat(value: Any) -> list[Tensor]:
    """Return the tensors in an output, those in the fields of dataclasses too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in _flat(part)]
    return [value] if isinstance(value, Tensor) else []
