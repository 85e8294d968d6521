"""torchao: float layers whose weights are ``IntxUnpackedToInt8Tensor`` made from the codes, for torchao's own tools."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import nn as lsq_nn
from lsquant._util.batches import unwrapped
from lsquant._util.errors import UsageError
from lsquant._util.optional import require
from lsquant.integer.model import freeze_quantizer, require_ready

TYPES = (nn.Linear, nn.Conv2d, nn.Embedding)
"""The float types whose weight torchao's tensor can be."""


def to_torchao(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in eval mode: float layers with ``torchao.quantization.IntxUnpackedToInt8Tensor`` weights.

    qdata, scale and zero_point hold the trained codes and steps: ``weight.dequantize()`` is ``code * step``, bit for
    bit.  Where the input was quantized its trained quantizer runs before the layer.  torchao multiplies in floating
    point, so outputs equal the trained ones up to the order of additions (docs/torchao.md).  ``model`` is unchanged.
    Raises: UsageError naming a layer that torchao's tensor has no form for, or whose step is not set; MissingExtra.
    """
    tensor = require("torchao.quantization", extra="torchao").IntxUnpackedToInt8Tensor
    model = unwrapped(model)
    if not any(True for _ in lsq_nn.quantized_layers(model)):
        raise UsageError("to_torchao: the model has no quantized layer; call lsquant.prepare(model, recipe) first")
    twin = copy.deepcopy(model).eval()
    made: dict[int, nn.Parameter] = {}  # a weight that layers share stays shared
    layers: list[tuple[str, Any]] = list(lsq_nn.quantized_layers(twin))
    for name, layer in layers:
        label, kind = name or type(layer).__name__, layer.float_type
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        if kind not in TYPES and weights is not None:
            known = ", ".join(t.__name__ for t in TYPES)
            raise UsageError(f"{label}: torchao's tensor serves {known}, not {kind.__name__}: leave it in float")
        frozen = None if inputs is None else freeze_quantizer(f"{label}.input_quantizer", inputs)
        if weights is not None:
            require_ready(f"{label}.weight_quantizer", weights)
            if id(weights) not in made:
                made[id(weights)] = nn.Parameter(_weight(tensor, layer, label), requires_grad=False)
            layer.weight = made[id(weights)]
        layer.detach_quantizers()
        layer.__class__ = kind
        if frozen is not None:
            layer.input_quantizer = frozen
            layer.register_forward_pre_hook(quantize_input)
    return twin


def quantize_input(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hook that runs the trained input quantizer before a layer."""
    return layer.input_quantizer(args[0]), *args[1:]


def _weight(tensor: Any, layer: Any, label: str) -> Tensor:
    """Codes as they are; unsigned ones with half their range taken off and put into the zero point."""
    codes, step, _ = layer.integer_weight()
    spec = layer.weight_quantizer.spec
    shift = 0 if codes.dtype == torch.int8 else 2 ** (spec.bits - 1)
    block = list(codes.shape)
    if spec.granularity != "tensor":
        block[0] = 1
    if spec.group_size is not None:
        kernel = codes[0, 0].numel()
        if spec.group_size % kernel:
            raise UsageError(
                f"{label}: torchao's blocks hold whole kernels of {kernel} weights, a group of {spec.group_size} does "
                "not; use granularity='channel' for it"
            )
        block[1] = spec.group_size // kernel
    blocks = [n // b for n, b in zip(codes.shape, block, strict=True)]
    return tensor(
        qdata=(codes.to(torch.int16) - shift).to(torch.int8),
        scale=step.reshape(blocks),
        zero_point=torch.full(blocks, -shift, dtype=torch.int8, device=codes.device),
        target_dtype=getattr(torch, f"int{spec.bits}"),
        block_size=tuple(block),
        dtype=layer.weight.dtype,
        activation_quantization=None,
    )
