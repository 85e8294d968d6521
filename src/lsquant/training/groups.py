"""Parameter groups for any torch optimizer."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lsquant._util.errors import UsageError
from lsquant.nn import quantized_layers
from lsquant.quantizer import Quantizer

# The factor on the decay by the bits of the weight; 1 for 4 bits and more. LSQ (arXiv:1902.08153), section 3:
# 1e-4 at 4 and 8 bits, 0.5e-4 at 3, 0.25e-4 at 2.
DECAY_FACTORS = {2: 0.25, 3: 0.5}

LOW_BIT = "low_bit"
"""The group of the weights below 8 bits, and "low_bit/2bit", "low_bit/3bit" where decay goes by bits."""

_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def is_low_bit(layer: Any) -> bool:
    """Return whether a quantized layer's weight has fewer than 8 bits and its quantizer is switched on."""
    quantizer = layer.weight_quantizer
    return quantizer is not None and quantizer.enabled and quantizer.spec.bits < 8


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    step_lr: float | None = None,
    relative_step_lr: float | None = None,
    weight_decay_by_bits: bool = False,
    low_bit: bool = False,
) -> list[dict[str, Any]]:
    """Return parameter groups "weights", "no_decay" and "steps" that hold every parameter of `model` exactly once.

    steps:    the steps and offsets of all quantizers: never decayed, learning rate `step_lr` (None: `lr`)
    no_decay: biases, the parameters of normalisation layers, and whatever has fewer than two dimensions
    weights:  everything else, decayed by `weight_decay` as given; with `weight_decay_by_bits` the weights of 2- and
              3-bit layers are groups of their own, "weights/2bit" and "weights/3bit", with 0.25 and 0.5 times that
    low_bit:  with `low_bit=True` only: the weights of layers below 8 bits, for ``training.TransitionRate``; by bits
              "low_bit/2bit" and "low_bit/3bit"

    For Adam-type optimizers the gradient scale g cancels: the learning rate then decides how far a step moves in an
    iteration, whatever its size. `relative_step_lr` suits them: the learning rate of a step s is then
    ``relative_step_lr * 2^round(log2 s)``, with the median of a quantizer's steps, in groups "steps/2^-3" and the like.

    Raises: UsageError for both `step_lr` and `relative_step_lr`, and for the latter while a step is not set.
    """
    if step_lr is not None and relative_step_lr is not None:
        raise UsageError("param_groups: give step_lr, the same for all steps, or relative_step_lr, not both")
    bits: dict[int, int] = {}
    low: set[int] = set()
    for _, layer in quantized_layers(model):
        if layer.weight_quantizer is not None:
            bits[id(layer.weight)] = layer.weight_quantizer.spec.bits
            low |= {id(layer.weight)} if low_bit and is_low_bit(layer) else set()

    groups: dict[str, dict[str, Any]] = {
        "weights": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "no_decay": {"params": [], "lr": lr, "weight_decay": 0.0},
        "steps": {"params": [], "lr": lr if step_lr is None else step_lr, "weight_decay": 0.0},
    }
    kinds: dict[int, str] = {}  # a parameter that is shared is a step or a norm's if it is so anywhere
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Quantizer):
                kinds[id(parameter)] = "steps" if relative_step_lr is None else f"steps/2^{_power(module)}"
            elif isinstance(module, _NORMS) or name.endswith("bias") or parameter.ndim < 2:
                kinds.setdefault(id(parameter), "no_decay")
    for parameter in model.parameters():
        kind = kinds.get(id(parameter), LOW_BIT if id(parameter) in low else "weights")
        group = {"params": [], "lr": lr, "weight_decay": weight_decay}
        if relative_step_lr is not None and kind.startswith("steps/"):
            group |= {"lr": relative_step_lr * 2.0 ** int(kind.partition("^")[2]), "weight_decay": 0.0}
        factor = DECAY_FACTORS.get(bits.get(id(parameter), 8)) if weight_decay_by_bits else None
        if kind in ("weights", LOW_BIT) and factor is not None:
            kind = f"{kind}/{bits[id(parameter)]}bit"
            group["weight_decay"] *= factor
        groups.setdefault(kind, group)["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items()]


def _power(quantizer: Quantizer) -> int:
    """Return round(log2 s) of a quantizer's step, of several the median."""
    step = float(quantizer.require_initialized().effective_step().detach().median())
    return round(math.log2(step)) if 0.0 < step < math.inf else 0
