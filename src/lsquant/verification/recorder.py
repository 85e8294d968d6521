"""What the trained model computes on a batch: its inputs and outputs, and those of every quantized layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import nn as lsq_nn
from lsquant import reference
from lsquant.export.capture import tensors_in
from lsquant.integer import FrozenQuantizer, IntegerLayer, frozen_parts
from lsquant.quantizer import Quantizer


@dataclass
class Call:
    """One call of the model.  layers: (name, call number within this call of the model) -> (input, output)."""

    inputs: list[Tensor]
    keywords: dict[str, Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    layers: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)


def watched(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> quantized layer or stand-alone quantizer, each once; of an integer model the frozen ones."""
    return frozen_parts(model) or {**dict(lsq_nn.quantized_layers(model)), **dict(lsq_nn.lone_quantizers(model))}


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Call]]:
    """Collect every call of ``model`` while the block runs; empty the list between batches."""
    calls: list[Call] = []
    counts: dict[str, int] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        counts.clear()
        calls.append(Call(tensors_in(args), {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        calls[-1].outputs = tensors_in(output)

    def layer_hook(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            number = counts[name] = counts.get(name, -1) + 1
            calls[-1].layers[name, number] = (tensors_in((args, kwargs))[0].detach(), output.detach())

        return hook

    handles = [model.register_forward_pre_hook(enter, with_kwargs=True)]
    for name, module in watched(model).items():
        handles.append(module.register_forward_hook(layer_hook(name), with_kwargs=True))
    handles.append(model.register_forward_hook(leave))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def samples(calls: list[Call]) -> int:
    """The size of a batch: the first dimension of the model's first input."""
    first = [*calls[0].inputs, *calls[0].keywords.values()]
    return sum(c.shape[0] if c.dim() else 1 for c in first[:1])


@torch.no_grad()
def layer_input(layer: Any, x: Tensor) -> Tensor:
    """What a layer quantizes: its input, padded where the padding mode is not zeros."""
    if isinstance(layer, IntegerLayer):
        return layer.before(x)
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return layer.padded(x)[0]
    return x


@torch.no_grad()
def input_codes(layer: Any, x: Tensor) -> Tensor | None:
    """The trained model's codes for a layer's input, float32 integers; None where the input is not quantized."""
    quantizer = layer if isinstance(layer, (Quantizer, FrozenQuantizer)) else layer.input_quantizer
    if quantizer is None or isinstance(quantizer, FrozenQuantizer):
        return None if quantizer is None else quantizer.float_codes(x)
    step, q_min, q_max = quantizer.effective_step(), quantizer.q_min, quantizer.q_max
    layout = {"axis": quantizer.axis, "group_size": quantizer.spec.group_size}
    return reference.codes(x, step, q_min, q_max, **layout, offset=quantizer.offset)
