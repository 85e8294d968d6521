"""Quantized layers.  They subclass the float layer and keep its Parameter objects and state-dict names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch import nn as _nn

from lsquant.nn.base import QuantizedLayer as QuantizedLayer
from lsquant.nn.base import weight_steps as weight_steps
from lsquant.nn.matmul import QuantConv2d as QuantConv2d
from lsquant.nn.matmul import QuantLinear as QuantLinear
from lsquant.nn.norm import ExactBatchNorm2d as ExactBatchNorm2d
from lsquant.nn.pool import ExactAdaptiveAvgPool2d as ExactAdaptiveAvgPool2d
from lsquant.nn.pool import ExactAvgPool2d as ExactAvgPool2d
from lsquant.quantizer import Quantizer

MATMUL_TYPES: dict[type, type[QuantizedLayer]] = {_nn.Linear: QuantLinear, _nn.Conv2d: QuantConv2d}
"""Float type -> quantized type of the layers that multiply.  Exact types: a user's subclass may compute otherwise."""

EXACT_TYPES: dict[type, Any] = {
    _nn.BatchNorm2d: ExactBatchNorm2d,
    _nn.AvgPool2d: ExactAvgPool2d,
    _nn.AdaptiveAvgPool2d: ExactAdaptiveAvgPool2d,
}
"""Float type -> the same layer with an eval mode that runtimes can repeat bit for bit."""

FLOAT_TYPES: dict[type, type] = {v: k for k, v in (MATMUL_TYPES | EXACT_TYPES).items()}


def quantized_layers(model: _nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """(name, layer) of every quantized layer, each once, in order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def quantizers(model: _nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer), each once, in order of definition; stand-alone ones included."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def integer_weights(model: _nn.Module) -> dict[str, tuple[Tensor, Tensor, None]]:
    """Name of each layer with a quantized weight -> ``layer.integer_weight()``."""
    return {n: m.integer_weight() for n, m in quantized_layers(model) if m.weight_quantizer is not None}
