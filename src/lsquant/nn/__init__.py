"""Quantized layers.  They subclass the float layer and keep its Parameter objects and state-dict names."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import nn as _nn

from lsquant._util.batches import unwrapped as _unwrapped
from lsquant.nn import layout as _layout
from lsquant.nn import norm as _norm
from lsquant.nn import pool as _pool
from lsquant.nn.base import QuantizedLayer as QuantizedLayer
from lsquant.nn.elements_per_step import input_elements as input_elements
from lsquant.nn.elements_per_step import weight_steps as weight_steps
from lsquant.nn.embedding import QuantEmbedding as QuantEmbedding
from lsquant.nn.encoder import UnfusedEncoder, UnfusedEncoderLayer
from lsquant.nn.functions import Chunk as Chunk
from lsquant.nn.functions import Clip as Clip
from lsquant.nn.functions import Mean as Mean
from lsquant.nn.functions import Resize as Resize
from lsquant.nn.functions import Slice as Slice
from lsquant.nn.functions import Split as Split
from lsquant.nn.joins import Add as Add
from lsquant.nn.joins import Cat as Cat
from lsquant.nn.joins import Mul as Mul
from lsquant.nn.layout import WeightLayout as WeightLayout
from lsquant.nn.matmul import QuantConv1d as QuantConv1d
from lsquant.nn.matmul import QuantConv2d as QuantConv2d
from lsquant.nn.matmul import QuantConv3d as QuantConv3d
from lsquant.nn.matmul import QuantConvTranspose1d as QuantConvTranspose1d
from lsquant.nn.matmul import QuantConvTranspose2d as QuantConvTranspose2d
from lsquant.nn.matmul import QuantConvTranspose3d as QuantConvTranspose3d
from lsquant.nn.matmul import QuantLinear as QuantLinear
from lsquant.nn.matmul import output_padding as output_padding
from lsquant.nn.norm import ExactBatchNorm as ExactBatchNorm
from lsquant.nn.norm import ExactBatchNorm2d as ExactBatchNorm2d
from lsquant.nn.pool import ExactAdaptiveAvgPool2d as ExactAdaptiveAvgPool2d
from lsquant.nn.pool import ExactAvgPool2d as ExactAvgPool2d
from lsquant.nn.stored import STORED_TYPES as STORED_TYPES
from lsquant.nn.stored import QuantAdd as QuantAdd
from lsquant.nn.stored import QuantMul as QuantMul
from lsquant.nn.stored import StoredInputs as StoredInputs
from lsquant.quantizer import Quantizer

_QUANTIZED = (
    QuantLinear, QuantConv1d, QuantConv2d, QuantConv3d, QuantConvTranspose1d, QuantConvTranspose2d,
    QuantConvTranspose3d, QuantEmbedding,
)  # fmt: skip
_EXACT = (
    _norm.ExactBatchNorm1d, ExactBatchNorm2d, _norm.ExactBatchNorm3d, _pool.ExactAvgPool1d, ExactAvgPool2d,
    _pool.ExactAvgPool3d, _pool.ExactAdaptiveAvgPool1d, ExactAdaptiveAvgPool2d, _pool.ExactAdaptiveAvgPool3d,
)  # fmt: skip

QUANTIZED_TYPES: dict[type, type[QuantizedLayer]] = {cls.float_type: cls for cls in _QUANTIZED}
"""Float type -> quantized type.  Exact types: a user's subclass may compute otherwise."""

EXACT_TYPES: dict[type, Any] = {cls.float_type: cls for cls in _EXACT}
"""Float type -> the same layer with an eval mode that runtimes can repeat bit for bit."""

UNFUSED_TYPES: dict[type, Any] = {cls.float_type: cls for cls in (UnfusedEncoderLayer, UnfusedEncoder)}
"""Float type -> the same module without a fused fast path that bypasses its layers."""

FOREIGN_TYPES = {
    "transformers.pytorch_utils.Conv1D": "lsquant.nn.transformers_conv1d:QuantConv1D",
    "transformers.models.falcon.modeling_falcon.FalconLinear": "lsquant.nn.transformers_falcon:QuantFalconLinear",
}
"""Float types of other packages by name -> module and class, imported only when such a layer is met."""


def quantized_type(layer: _nn.Module) -> type[QuantizedLayer] | None:
    """Return the quantized type of a layer, float or quantized; None for a layer that cannot be quantized."""
    if isinstance(layer, QuantizedLayer):
        return type(layer)
    kind = type(layer)
    if (place := FOREIGN_TYPES.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
        module, name = place.split(":")
        return getattr(importlib.import_module(module), name)
    return QUANTIZED_TYPES.get(kind)


def row_shape(layer: Any) -> torch.Size:
    """Return the shape of a layer's weight with output channels first; the layer is a float one or a quantized one."""
    kind = quantized_type(layer)
    assert kind is not None
    return kind.weight_layout.row_shape(layer.weight.shape, _layout.conv_groups(layer))


def stored_layout(layer: Any) -> int:
    """Return 0 for a weight with output channels first, else the groups within which these come second."""
    kind = quantized_type(layer)
    assert kind is not None
    return 0 if kind.weight_layout is WeightLayout.OUTPUT_FIRST else _layout.conv_groups(layer)


def float_type(module: _nn.Module) -> type[_nn.Module] | None:
    """Return the float type that ``revert`` gives a converted module back; None for a module that was not converted."""
    return getattr(module, "float_type", None) if type(module).__module__.startswith("lsquant.") else None


def quantized_layers(model: _nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Yield (name, layer) of every quantized layer, each once, in order of definition."""
    for name, module in _unwrapped(model).named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def quantizers(model: _nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Yield (name, quantizer), each once, in order of definition; stand-alone ones included."""
    for name, module in _unwrapped(model).named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def stored_quantizers(model: _nn.Module) -> set[Quantizer]:
    """Return the quantizers that are called for stored tensors: those of joins, and of layers that read fewer bits."""
    joins = (m for m in _unwrapped(model).modules() if isinstance(m, StoredInputs))
    found: set[Any] = {q for join in joins for q in join.input_quantizers}
    found |= {layer.stored_quantizer for _, layer in quantized_layers(model)}
    return found - {None}


def lone_quantizers(model: _nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Return (name, quantizer) of those that are called as modules: custom layers' own, and those of stored tensors."""
    owned = {q for _, layer in quantized_layers(model) for q in layer.own_quantizers()} - stored_quantizers(model)
    return ((name, q) for name, q in quantizers(model) if q not in owned)


def integer_weights(model: _nn.Module) -> dict[str, tuple[Tensor, Tensor, None]]:
    """Name of each layer with a quantized weight -> ``layer.integer_weight()``."""
    return {n: m.integer_weight() for n, m in quantized_layers(model) if m.weight_quantizer is not None}
