"""From a trained model to its integer model: a copy in which quantized layers hold codes instead of float weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import nn as lsq_nn
from lsquant._util.batches import unwrapped
from lsquant._util.errors import UsageError
from lsquant.integer.layers import (
    FrozenQuantizer,
    IntegerBatchNorm,
    IntegerConv,
    IntegerEmbedding,
    IntegerLayer,
    IntegerLinear,
)
from lsquant.quantizer import Quantizer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS: dict[str, type[IntegerLayer]] = {
    **{kind.__name__: IntegerConv for kind in CONVOLUTIONS},
    **dict.fromkeys(("Linear", "Conv1D", "FalconLinear"), IntegerLinear),  # the latter two are transformers'
    "Embedding": IntegerEmbedding,
}
"""Name of a float type -> its frozen counterpart."""


def to_integer(model: nn.Module) -> nn.Module:
    """The integer model: a copy of ``model`` in eval mode with codes, steps and what stays float, and nothing else.

    A layer ``conv`` has ``conv.weight_quantizer.codes`` (int8 or uint8, output channels first), ``.step``, ``.bounds``
    and ``conv.input_quantizer.step`` in the state dict; there is no float weight behind the codes.  It runs on the
    engines that train (``lsquant.use_engine``); its outputs equal those of ``model.eval()``, bit for bit, in each.
    ``model`` is unchanged; shared modules and weights stay shared.
    Raises: UsageError for a model without quantized layers, and naming a layer that has no integer form or whose
    quantizer has no step yet, is switched off or has values without a code.
    """
    model = unwrapped(model)
    if frozen_parts(model):
        raise UsageError("this is an integer model already; give the trained model it was made from")
    if not any(True for _ in lsq_nn.quantizers(model)):
        raise UsageError("to_integer: the model has no quantized layer; call lsquant.prepare(model, recipe) first")
    return integer_model(model)


def integer_model(model: nn.Module) -> nn.Module:
    """``to_integer`` for exporters: of any model."""
    memo: dict[int, Any] = {}
    for name, layer in lsq_nn.quantized_layers(model):
        memo[id(layer)] = freeze_layer(name, layer, memo)
    for name, quantizer in lsq_nn.lone_quantizers(model):
        memo[id(quantizer)] = freeze_quantizer(name, quantizer)
    for module in model.modules():
        if isinstance(module, lsq_nn.ExactBatchNorm):
            memo[id(module)] = IntegerBatchNorm(*module.affine_constants(), module.dims)
    return copy.deepcopy(model, memo).eval()


def frozen_parts(model: nn.Module) -> dict[str, Any]:
    """Name -> frozen layer, or frozen quantizer that stands alone, each once; empty for any other model."""
    named = list(model.named_modules())
    owned = {q for _, m in named if isinstance(m, IntegerLayer) for q in m.children()}
    kinds = (IntegerLayer, FrozenQuantizer)
    return {name: m for name, m in named if isinstance(m, kinds) and m not in owned}


def freeze_quantizer(name: str, quantizer: Quantizer, codes: Tensor | None = None) -> FrozenQuantizer:
    """The quantizer with its step, zero point and bounds as they are now."""
    require_ready(name, quantizer)
    step, bounds = quantizer.effective_step(), (quantizer.q_min, quantizer.q_max)
    if not bool((torch.isfinite(step * 2**8) & (step > 0)).all()):
        raise UsageError(f"{name}: a step is {step[~(torch.isfinite(step * 2**8) & (step > 0))][0]}, no step to ship")
    return FrozenQuantizer(step, *bounds, quantizer.zero_point(), quantizer.axis, quantizer.spec.group_size, codes)


def freeze_layer(name: str, layer: Any, memo: dict[int, Any]) -> IntegerLayer:
    """The frozen counterpart of a quantized layer.  memo: id of a quantizer -> the frozen one, for shared weights."""
    label, kind = name or type(layer).__name__, layer.float_type.__name__
    if kind not in KINDS:
        raise UsageError(f"{label}: {kind} has no integer form; leave it in floating point: skip=[{label!r}]")
    if getattr(layer, "max_norm", None) is not None:
        raise UsageError(f"{label}: an Embedding with max_norm changes its weight in use; it has no integer form")
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    if weights is not None and id(weights) not in memo:
        require_ready(f"{label}.weight_quantizer", weights)
        codes = layer.to_rows(layer.integer_weight()[0])
        memo[id(weights)] = freeze_quantizer(f"{label}.weight_quantizer", weights, codes)
    if inputs is not None and id(inputs) not in memo:
        memo[id(inputs)] = freeze_quantizer(f"{label}.input_quantizer", inputs)
    return KINDS[kind](layer, memo.get(id(weights)), memo.get(id(inputs)))


def require_ready(name: str, quantizer: Quantizer) -> None:
    """Raises UsageError for a quantizer without a step, or switched off."""
    if not quantizer.is_initialized:
        remedy = (
            "load or set its weights" if name.endswith("weight_quantizer") else "run lsquant.calibrate(model, batches)"
        )
        raise UsageError(f"{name}: this quantizer has no step yet; {remedy} first")
    if not quantizer.enabled:
        raise UsageError(f"{name}: this quantizer is switched off (lsquant.disabled); call this outside of that block")
