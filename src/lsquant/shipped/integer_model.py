"""The integer model: a copy of a trained model in which quantized layers hold codes instead of float weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from lsquant import nn as lsq_nn
from lsquant._util.batches import unwrapped
from lsquant._util.errors import UsageError
from lsquant.shipped.copying import copied
from lsquant.shipped.frozen import FrozenQuantizer
from lsquant.shipped.integer_layers import IntegerBatchNorm, IntegerConv, IntegerEmbedding, IntegerLayer, IntegerLinear
from lsquant.shipped.record import Shipped, ShippedLayer, ship
from lsquant.unsupported import not_its_own

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS: dict[str, type[IntegerLayer]] = {
    **{kind.__name__: IntegerConv for kind in CONVOLUTIONS},
    **dict.fromkeys(("Linear", "Conv1D", "FalconLinear"), IntegerLinear),  # the latter two are transformers'
    "Embedding": IntegerEmbedding,
}
"""The name of a float type -> its layer in the integer model."""


def to_integer(model: nn.Module) -> nn.Module:
    """Return the integer model: a copy in eval mode with codes, steps and what stays float, and nothing else.

    A layer ``conv`` has ``conv.weight_quantizer.codes`` (int8 or uint8, output channels first), ``.step``, ``.bounds``
    and ``conv.input_quantizer.step`` in the state dict.  No float weight is kept behind the codes.  The copy runs on
    the engines that train (``lsquant.use_engine``); in each its outputs equal those of ``model.eval()`` bit for bit.
    Shared modules and weights stay shared, and forward hooks act on the copy as they did.

    model: the trained model, which is unchanged.

    Raises: UsageError for a model without quantized layers, and naming a layer that has no integer form or whose
        quantizer has no step yet, is switched off or has values without a code.
    """
    model = unwrapped(model)
    if frozen_parts(model):
        raise UsageError("this is an integer model already; give the trained model it was made from")
    if not any(True for _ in lsq_nn.quantizers(model)):
        raise UsageError("to_integer: the model has no quantized layer; call lsquant.prepare(model, recipe) first")
    return integer_model(ship(model))


def integer_model(record: Shipped) -> nn.Module:
    """Return the integer model of a record, also of one without quantized layers.

    Raises: UsageError naming a layer that has no integer form.
    """
    frozen: dict[nn.Module, nn.Module] = {}  # trained module -> its frozen counterpart
    parts: dict[str, FrozenQuantizer] = {}
    names = {module: name for name, module in record.model.named_modules()}
    for layer in record.layers.values():
        require_integer_form(layer)
    for quantizer in record.quantizers.values():
        frozen[quantizer.source] = parts[quantizer.name] = FrozenQuantizer(quantizer)
    for layer in record.layers.values():
        weights = None if layer.weight is None else parts[layer.weight.name]
        inputs = None if layer.input is None else parts[layer.input.name]
        stored = None if layer.stored is None else parts[layer.stored.name]
        frozen[layer.source] = KINDS[layer.kind](layer, weights, inputs, stored)
    for module in record.model.modules():
        if isinstance(module, lsq_nn.ExactBatchNorm) and module.running_mean is not None:  # else no constants
            if reason := not_its_own(module):
                raise UsageError(f"{names[module]}: {reason}, so it has no fixed constants")
            frozen[module] = IntegerBatchNorm(*module.affine_constants(), module.dims)
    return copied(record.model, frozen).eval()


def require_integer_form(layer: ShippedLayer) -> None:
    """Raise a UsageError that names a layer whose kind has no integer form."""
    if layer.kind not in KINDS:
        raise UsageError(
            f"{layer.label}: {layer.kind} has no integer form; leave it in floating point: skip=[{layer.label!r}]"
        )


def frozen_parts(model: nn.Module) -> dict[str, Any]:
    """Return the frozen layers and stand-alone frozen quantizers by name, each once; nothing for any other model."""
    named = list(model.named_modules())
    layers = [m for _, m in named if isinstance(m, IntegerLayer)]
    called = {q for _, m in named if isinstance(m, lsq_nn.StoredInputs) for q in m.input_quantizers}
    called |= {layer.stored_quantizer for layer in layers}
    owned = {q for layer in layers for q in layer.children()} - called
    kinds = (IntegerLayer, FrozenQuantizer)
    return {name: m for name, m in named if isinstance(m, kinds) and m not in owned}
