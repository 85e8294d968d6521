"""torchao: float layers whose weights are ``IntxUnpackedToInt8Tensor`` made from the codes, for torchao's own tools."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lsquant import nn as lsq_nn
from lsquant._util.errors import UsageError
from lsquant._util.optional import require
from lsquant.formats.base import ModuleFormat
from lsquant.shipped import FrozenQuantizer, ShippedLayer, ShippedQuantizer, copied, ship
from lsquant.unsupported import TORCHAO_TYPES


def to_torchao(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode: float layers with ``torchao.quantization.IntxUnpackedToInt8Tensor`` weights.

    qdata, scale and zero_point hold the trained codes and steps: ``weight.dequantize()`` is ``code * step``, bit for
    bit.  Where the input was quantized its trained quantizer runs before the layer.  torchao multiplies in floating
    point, so outputs equal the trained ones up to the order of additions (docs/torchao.md).

    model: the trained model, which is unchanged.

    Raises: UsageError naming a layer that torchao's tensor has no form for, or whose step is not set; MissingExtra.
    """
    tensor = require("torchao.quantization", extra="torchao").IntxUnpackedToInt8Tensor
    record = ship(model).require_layers("to_torchao")
    for shipped in record.layers.values():
        if shipped.weight is not None and shipped.source.float_type not in TORCHAO_TYPES:
            known = ", ".join(t.__name__ for t in TORCHAO_TYPES)
            raise UsageError(f"{shipped.label}: torchao's tensor serves {known}, not {shipped.kind}: leave it in float")
    twin = copied(record.model).eval()
    made: dict[str, nn.Parameter] = {}  # a weight that layers share stays shared
    layers: list[tuple[str, Any]] = list(lsq_nn.quantized_layers(twin))
    for name, layer in layers:
        shipped = record.layers[name]
        if shipped.weight is not None:
            if shipped.weight.name not in made:
                value = _weight(tensor, shipped, shipped.weight)
                made[shipped.weight.name] = nn.Parameter(value, requires_grad=False)
            layer.weight = made[shipped.weight.name]
        layer.detach_quantizers()
        layer.__class__ = layer.float_type
        if shipped.input is not None:
            layer.input_quantizer = FrozenQuantizer(shipped.input)
            layer.register_forward_pre_hook(quantize_input, with_kwargs=True)  # after those of the user
    return twin


def quantize_input(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run the trained input quantizer before a layer: a forward pre-hook."""
    if args:
        return (layer.input_quantizer(args[0]), *args[1:]), kwargs
    name, x = next(iter(kwargs.items()))
    return (), {**kwargs, name: layer.input_quantizer(x)}


def _weight(tensor: Any, layer: ShippedLayer, quantizer: ShippedQuantizer) -> Tensor:
    """Return torchao's tensor of the codes; unsigned codes are lowered by half their range, and so the zero point."""
    assert quantizer.weight is not None
    if layer.source.weight.dtype == torch.float64:
        raise UsageError(f"{layer.label}: torchao's tensor has no float64; call model.float() first")
    codes, spec = quantizer.weight.own_codes(), quantizer.spec
    shift = 0 if codes.dtype == torch.int8 else 2 ** (spec.bits - 1)
    block = list(codes.shape)
    if spec.granularity != "tensor":
        block[0] = 1
    if spec.group_size is not None:
        kernel = codes[0, 0].numel()
        if spec.group_size % kernel:
            raise UsageError(
                f"{layer.label}: torchao's blocks hold whole kernels of {kernel} weights, a group of "
                f"{spec.group_size} does not; use granularity='channel' for it"
            )
        block[1] = spec.group_size // kernel
    blocks = [n // b for n, b in zip(codes.shape, block, strict=True)]
    return tensor(
        qdata=(codes.to(torch.int16) - shift).to(torch.int8),
        scale=quantizer.step.reshape(blocks),
        zero_point=torch.full(blocks, -shift, dtype=torch.int8, device=codes.device),
        target_dtype=getattr(torch, f"int{spec.bits}"),
        block_size=tuple(block),
        dtype=layer.source.weight.dtype,
        activation_quantization=None,
    )


class TorchaoFormat(ModuleFormat):
    """The row of torchao in the table of formats."""

    name = "torchao"
    about = "float layers with torchao's tensors of codes as weights, for torchao's own tools"
    promise = "weights"

    def make(self, model: nn.Module) -> nn.Module:
        return to_torchao(model)
