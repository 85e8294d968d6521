"""What the trained model computes on a batch: its inputs and outputs, and those of every quantized layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import nn as lsq_nn
from lsquant import reference
from lsquant._util.batches import uncompiled
from lsquant._util.nested import Path, map_tensors, named_tensors, tensors_in
from lsquant.fusion import FusedNetwork, Tap
from lsquant.quantizer import Quantizer
from lsquant.shipped import FrozenQuantizer, IntegerLayer, frozen_parts

LayerCall = tuple[str, int]
"""The name of a layer and the number of its call within one call of the model, from 0."""


@dataclass(frozen=True)
class Recorded:
    """One call of a layer.

    args, keywords: what it was called with; tensors are copies, which later operations in place do not change.
    output: a copy as well.
    """

    args: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor

    @property
    def input(self) -> Tensor:
        """The first tensor it was called with."""
        return tensors_in((self.args, self.keywords))[0]


@dataclass
class Call:
    """One call of the model.

    inputs, keywords: the tensors it was called with, by position and by name; a tensor in a container is named after
        the way to it, ``batch_pixels``.
    names: of the inputs by position, after the arguments of ``forward``.
    outputs: the tensors that it returned.
    returned: the name of the type that it returned.
    layers: the calls of its layers, in order of execution.
    """

    inputs: list[Tensor]
    keywords: dict[str, Tensor]
    names: list[str] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    returned: str = ""
    layers: dict[LayerCall, Recorded] = field(default_factory=dict)


def watched(model: nn.Module) -> dict[str, nn.Module]:
    """Return quantized layers and stand-alone quantizers by name, each once; of an integer model the frozen ones.

    Of a fused network the taps on its stored tensors.
    """
    if isinstance(model, FusedNetwork):
        return dict(model.taps)
    return frozen_parts(model) or {**dict(lsq_nn.quantized_layers(model)), **dict(lsq_nn.lone_quantizers(model))}


@contextmanager
def recording(model: nn.Module, layers: bool = True) -> Iterator[list[Call]]:
    """Collect every call of ``model`` while the block runs; empty the list between batches.

    layers: whether the calls of its layers are kept, too.
    """
    calls: list[Call] = []
    counts: dict[str, int] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        counts.clear()
        keywords = {_joined(path): tensor for path, tensor in named_tensors(kwargs)}
        calls.append(Call(tensors_in(args), keywords, _argument_names(module, args)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        calls[-1].outputs, calls[-1].returned = tensors_in(output), type(output).__name__

    def layer_hook(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            number = counts[name] = counts.get(name, -1) + 1
            args, kwargs = map_tensors((args, kwargs), _copy)
            calls[-1].layers[name, number] = Recorded(args, kwargs, _copy(output))

        return hook

    handles = [model.register_forward_pre_hook(enter, with_kwargs=True)]
    for name, module in watched(model).items() if layers else ():
        handles.append(module.register_forward_hook(layer_hook(name), prepend=True, with_kwargs=True))
    handles.append(model.register_forward_hook(leave))
    try:
        with uncompiled():
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def _argument_names(model: nn.Module, args: tuple[Any, ...]) -> list[str]:
    """Return a name for each tensor among the positional arguments; "" where ``forward`` does not tell."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*args).arguments
    except (TypeError, ValueError):
        return [""] * len(tensors_in(args))
    return [_joined(path) for path, _ in named_tensors(bound)]


def _joined(path: Path) -> str:
    return "_".join(map(str, path))


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone()


def samples(calls: list[Call]) -> int:
    """Return the size of a batch: the first dimension of the model's first input."""
    first = [*calls[0].inputs, *calls[0].keywords.values()]
    return sum(c.shape[0] if c.dim() else 1 for c in first[:1])


@torch.no_grad()
def layer_input(layer: Any, x: Tensor) -> Tensor:
    """Return what a layer quantizes: its input, padded where the padding mode is not zeros."""
    stored = getattr(layer, "stored_quantizer", None)
    x = x if stored is None else stored.forward(x)  # no call: calls are recorded
    if isinstance(layer, IntegerLayer):
        return layer.before(x)
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return layer.padded(x)[0]
    return x


@torch.no_grad()
def input_codes(layer: Any, x: Tensor) -> Tensor | None:
    """Return a layer's codes of its input, float32 integers; None where the input is not quantized.

    layer: quantized, frozen, or a quantizer of either kind.
    """
    if isinstance(layer, Tap):
        return x
    quantizer = layer if isinstance(layer, (Quantizer, FrozenQuantizer)) else layer.input_quantizer
    if quantizer is None or isinstance(quantizer, FrozenQuantizer):
        return None if quantizer is None else quantizer.float_codes(x)
    step, q_min, q_max = quantizer.effective_step(), quantizer.q_min, quantizer.q_max
    layout = {"axis": quantizer.axis, "group_size": quantizer.spec.group_size}
    return reference.codes(x, step, q_min, q_max, **layout, offset=quantizer.offset)
