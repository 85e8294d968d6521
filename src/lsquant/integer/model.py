"""From a trained model to its integer model: a copy in which quantized layers hold codes instead of float weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lsquant import nn as lsq_nn
from lsquant._util.errors import UsageError
from lsquant.integer.layers import FrozenQuantizer, IntegerBatchNorm, IntegerConv, IntegerLayer, IntegerLinear
from lsquant.quantizer import Quantizer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def integer_model(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in eval mode whose quantized layers are frozen layers over integer codes.

    ``model`` is unchanged.  Shared modules stay shared.  No float copy of a quantized weight is made.  The outputs are
    equal, bit for bit.
    Raises: UsageError naming a layer whose quantizer has no step yet or is switched off.
    """
    memo: dict[int, Any] = {}
    for name, layer in lsq_nn.quantized_layers(model):
        memo[id(layer)] = freeze_layer(name, layer)
    for name, quantizer in lsq_nn.lone_quantizers(model):
        memo[id(quantizer)] = freeze_quantizer(name, quantizer)
    for module in model.modules():
        if isinstance(module, lsq_nn.ExactBatchNorm):
            memo[id(module)] = IntegerBatchNorm(*module.affine_constants(), module.dims)
    return copy.deepcopy(model, memo).eval()


def freeze_quantizer(name: str, quantizer: Quantizer) -> FrozenQuantizer:
    """The quantizer with its step, zero point and bounds as they are now."""
    if not quantizer.is_initialized:
        raise UsageError(f"{name}: this quantizer has no step yet; run lsquant.calibrate(model, batches) first")
    if not quantizer.enabled:
        raise UsageError(f"{name}: this quantizer is switched off (lsquant.disabled); call this outside of that block")
    if quantizer.spec.group_size is not None:
        raise UsageError(f"{name}: a stand-alone quantizer with groups has no integer form; use tensor or channel")
    step = quantizer.effective_step()
    return FrozenQuantizer(step, quantizer.q_min, quantizer.q_max, quantizer.zero_point(), quantizer.axis)


def freeze_layer(name: str, layer: Any) -> IntegerLayer:
    """The frozen counterpart of a quantized Linear or convolution."""
    weights: Quantizer | None = layer.weight_quantizer
    codes, step, bounds, group_size = None, None, (0, 0), None
    label = name or type(layer).__name__
    if weights is not None:
        _check_weights(f"{label}.weight_quantizer", weights)
        codes, step, zero_point = layer.integer_weight()
        codes = layer.rearranged(codes)
        if zero_point is not None:
            raise UsageError(f"{label}: weights with a zero point (offset=True) have no integer model yet")
        bounds, group_size = (weights.q_min, weights.q_max), weights.spec.group_size
    inputs = layer.input_quantizer
    frozen = None if inputs is None else freeze_quantizer(f"{label}.input_quantizer", inputs)
    common = (frozen, codes, step, bounds, layer.rows() if weights is None else None, layer.bias, group_size)
    if isinstance(layer, nn.Linear):
        return IntegerLinear(*common)
    if isinstance(layer, CONVOLUTIONS):
        return IntegerConv(*common, source=layer)
    kind = type(layer).__name__.removeprefix("Quant")
    raise UsageError(
        f"{label}: {kind} cannot be exported yet; leave it in floating point before training: skip=[{label!r}]"
    )


def _check_weights(name: str, quantizer: Quantizer) -> None:
    if not quantizer.is_initialized:
        raise UsageError(f"{name}: this quantizer has no step yet; prepare the model with its weights loaded")
    if not quantizer.enabled:
        raise UsageError(f"{name}: this quantizer is switched off (lsquant.disabled); call this outside of that block")
