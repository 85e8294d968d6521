"""What ships of a trained model, taken out of its layers in one place.

``ship`` makes the record.  The integer model, every format, the golden vectors and the verdict read it, so all of them
hold the same codes, steps, zero points and bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import nn as lsq_nn
from lsquant import ops
from lsquant._util.batches import unwrapped
from lsquant._util.errors import UsageError
from lsquant.fusion import FusedNetwork
from lsquant.joining import STORED
from lsquant.quantizer import Quantizer
from lsquant.spec import QuantSpec
from lsquant.tied import TiedQuantizer
from lsquant.tying import require_one_quantizer_each
from lsquant.unsupported import require_fit, require_no_global_hooks, require_no_hooks, warn_of_added


@dataclass(frozen=True)
class ShippedWeight:
    """The codes of a quantized weight.

    name: of the weight in the state dict, in the first layer that has it.
    codes: (out, ...) int8 or uint8, output channels first.
    exchanged: the groups within which the weight's own layout has the first two dimensions of ``codes`` exchanged, as
        that of a transposed convolution; 0 where it has the layout of ``codes``.
    """

    name: str
    codes: Tensor
    exchanged: int

    def own_codes(self) -> Tensor:
        """Return the codes in the weight's own layout."""
        return own_layout(self.codes, self.exchanged)


@dataclass(frozen=True)
class ShippedQuantizer:
    """The numbers of one quantizer, as they are shipped.

    name: in the state dict, ``conv.weight_quantizer``.
    source: the trained quantizer.
    spec: bits, sign and granularity, decided.
    requested: the same as the recipe has it; its sign may be undecided.
    step: (steps,) float32, guarded, finite and above 0.
    zero_point: (steps,) int32, None for 0.
    axis: the dimension with a step per index, None for one step and for groups.
    count: N of the gradient scale, 0 where unknown.
    weight: the codes, None for a quantizer of activations.
    owner: name of the quantizer whose step it has, None where the step is its own.
    """

    name: str
    source: Quantizer
    spec: QuantSpec
    requested: QuantSpec
    step: Tensor
    zero_point: Tensor | None
    axis: int | None
    count: int
    weight: ShippedWeight | None = None
    owner: str | None = None

    @property
    def q_min(self) -> int:
        """The lowest code."""
        return self.spec.q_min

    @property
    def q_max(self) -> int:
        """The highest code."""
        return self.spec.q_max

    @property
    def group_size(self) -> int | None:
        """The number of neighbours in a row that share a step, None without groups."""
        return self.spec.group_size


@dataclass(frozen=True)
class ShippedLayer:
    """One quantized layer.

    name: in the model.
    source: the trained layer, for its geometry, its bias and a weight that stays float.
    kind: name of its float type, "Conv2d".
    weight, input: its quantizers, None for a side that stays float.
    stored: of the stored tensor that it reads with fewer bits, None where there is none.
    exchanged: as in ShippedWeight.
    """

    name: str
    source: Any
    kind: str
    weight: ShippedQuantizer | None
    input: ShippedQuantizer | None
    stored: ShippedQuantizer | None
    exchanged: int

    @property
    def label(self) -> str:
        """The name in messages: that of the layer, or its type where the layer is the whole model."""
        return self.name or type(self.source).__name__


@dataclass(frozen=True)
class Shipped:
    """The record of a model.

    model: the trained one.
    quantizers: by name, each once, in order of definition.
    layers: by name, each once, in order of definition.
    joins: of what joins read, None where they are floating point.
    """

    model: nn.Module
    quantizers: dict[str, ShippedQuantizer]
    layers: dict[str, ShippedLayer]
    joins: QuantSpec | None = None

    def standalone(self) -> dict[str, ShippedQuantizer]:
        """Return the quantizers that are called as modules, by name."""
        called = dict(lsq_nn.lone_quantizers(self.model)).values()
        return {name: q for name, q in self.quantizers.items() if q.source in called}

    def require_layers(self, caller: str) -> Shipped:
        """Return the record.  Raises: UsageError naming ``caller`` for a model without quantized layers."""
        if not self.layers:
            raise UsageError(f"{caller}: the model has no quantized layer; call lsquant.prepare(model, recipe) first")
        return self


@torch.no_grad()
def ship(model: nn.Module) -> Shipped:
    """Return the record of a trained model, which is unchanged.

    model: prepared and calibrated, also inside DataParallel and the like.

    Raises: UsageError naming a quantizer that has no step, is switched off, or has a step or values that cannot be
        shipped; a layer whose weight or bias is made by a hook or a parametrization, whose steps do not fit its weight,
        whose ``forward`` was replaced, an Embedding with ``max_norm``; a weight quantizer of two weights, or two of
        one; a forward hook of a layer's quantizer, and a global one.
    Warns: UserWarning naming layers that came into the model after ``prepare``, which ship in floating point.
    """
    model = unwrapped(model)
    if isinstance(model, FusedNetwork):
        raise UsageError("this is a fused network: give its model, network.model, or write it by profile='integer'")
    require_no_global_hooks()
    layers = list(lsq_nn.quantized_layers(model))
    warn_of_added(model)
    require_one_quantizer_each(model)
    labels = {q: name for name, q in lsq_nn.quantizers(model)}
    weights: dict[Quantizer, ShippedWeight] = {}
    owners: dict[Quantizer, tuple[str, lsq_nn.QuantizedLayer]] = {}
    for name, layer in layers:
        label = name or type(layer).__name__
        require_fit(name, layer)
        for side, quantizer in (("weight", layer.weight_quantizer), ("input", layer.input_quantizer)):
            if quantizer is not None:
                require_shippable(f"{label}.{side}_quantizer", quantizer)
                require_no_hooks(f"{label}.{side}_quantizer", quantizer)
        if getattr(layer, "max_norm", None) is not None:
            raise UsageError(f"{label}: an Embedding with max_norm changes its weight in use, so it has no fixed codes")
        if (own := layer.weight_quantizer) is not None:
            first_name, first = owners.setdefault(own, (label, layer))
            if layer.weight is not first.weight:
                raise UsageError(
                    f"{label}: its weight_quantizer is that of {first_name!r}, whose weight is another one; call "
                    "lsquant.prepare(model, recipe) again, after layer.weight_quantizer = None"
                )
        if layer.weight_quantizer is not None and layer.weight_quantizer not in weights:
            codes = layer.to_rows(layer.integer_weight()[0])
            weight_name = f"{name}.weight".lstrip(".")
            weights[layer.weight_quantizer] = ShippedWeight(weight_name, codes, lsq_nn.stored_layout(layer))
    found = {}
    for quantizer, name in labels.items():
        require_shippable(name, quantizer)
        found[quantizer] = ShippedQuantizer(
            name=name,
            source=quantizer,
            spec=quantizer.spec,
            requested=quantizer.requested,
            step=quantizer.effective_step().detach().clone(),
            zero_point=quantizer.zero_point(),
            axis=quantizer.axis,
            count=quantizer.elements_per_step,
            weight=weights.get(quantizer),
            owner=labels[quantizer.owner] if isinstance(quantizer, TiedQuantizer) else None,
        )
    shipped_layers = {}
    for name, layer in layers:
        weight, source = layer.weight_quantizer, layer.input_quantizer
        shipped_layers[name] = ShippedLayer(
            name=name,
            source=layer,
            kind=layer.float_type.__name__,
            weight=None if weight is None else found[weight],
            input=None if source is None else found[source],
            stored=None if layer.stored_quantizer is None else found[layer.stored_quantizer],
            exchanged=lsq_nn.stored_layout(layer),
        )
    return Shipped(model, {q.name: q for q in found.values()}, shipped_layers, vars(model).get(STORED))


def require_all_shippable(model: nn.Module) -> None:
    """Raise a UsageError as ``require_shippable`` does, for the first of a model's quantizers that it is for."""
    for name, quantizer in lsq_nn.quantizers(model):
        require_shippable(name, quantizer)


def require_shippable(name: str, quantizer: Quantizer) -> None:
    """Raise a UsageError that names a quantizer without a step, switched off, or with one that cannot be shipped."""
    if not quantizer.is_initialized:
        calibrate = "run lsquant.calibrate(model, batches)"
        remedy = "load or set its weights" if name.endswith("weight_quantizer") else calibrate
        raise UsageError(f"{name}: this quantizer has no step yet; {remedy} first")
    if not quantizer.enabled:
        raise UsageError(f"{name}: this quantizer is switched off (lsquant.disabled); call this outside of that block")
    step = quantizer.effective_step().detach()
    good = is_shippable(step)
    if not bool(good.all()):
        raise UsageError(f"{name}: a step is {step[~good][0]}, no step to ship")
    offset = None if quantizer.offset is None else quantizer.offset.detach()
    if offset is not None and not bool(torch.isfinite(offset).all()):
        raise UsageError(f"{name}: an offset is {offset[~torch.isfinite(offset)][0]}, which has no zero point to ship")


def is_shippable(step: Tensor) -> Tensor:
    """Tell which steps can be shipped: finite, above 0, and small enough that ``2^8 * step`` is finite.

    step: (...) float32.  Returns (...) bool.
    """
    return torch.isfinite(step * 2**8) & (step > 0)


def own_layout(rows: Tensor, exchanged: int) -> Tensor:
    """Return a weight in its own layout.  rows: (out, ...), output channels first; exchanged: as in ShippedWeight."""
    return ops.swap_channels(rows, exchanged) if exchanged else rows
