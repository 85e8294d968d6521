"""Parameter groups for any torch optimizer."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lsquant._util.batches import unwrapped
from lsquant._util.errors import UsageError
from lsquant.quantizer import Quantizer
from lsquant.tying import weight_quantizers

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
    iteration, whatever its size. `relative_step_lr` suits them: every quantizer has a group of its own, "steps/NAME",
    with the learning rate `relative_step_lr * s0`; s0 is its initial step, of several the median. A step that
    is not set yet counts as 1, with a warning: the rates are then right only once an optimizer state is loaded.

    Raises: UsageError for both `step_lr` and `relative_step_lr`.
    """
    if step_lr is not None and relative_step_lr is not None:
        raise UsageError("param_groups: give step_lr, the same for all steps, or relative_step_lr, not both")
    model = unwrapped(model)
    bits: dict[nn.Parameter, int] = {}
    low: set[nn.Parameter] = set()
    for quantizer, (_, layer) in weight_quantizers(model).items():
        bits[layer.weight] = quantizer.spec.bits
        if low_bit and is_low_bit(layer):
            low.add(layer.weight)

    groups: dict[str, dict[str, Any]] = {
        "weights": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "no_decay": {"params": [], "lr": lr, "weight_decay": 0.0},
        "steps": {"params": [], "lr": lr if step_lr is None else step_lr, "weight_decay": 0.0},
    }
    if relative_step_lr is not None:
        del groups["steps"]
        unset = [q.name for q in model.modules() if isinstance(q, Quantizer) and not q.is_initialized]
        if unset:
            warnings.warn(
                f"param_groups: the step of {unset[0]!r} is not set ({len(unset)} are not), and relative_step_lr is "
                "relative to it: call calibrate first, or load the state of an optimizer",
                stacklevel=2,
            )
    kinds: dict[nn.Parameter, str] = {}  # a parameter that is shared is a step or a norm's if it is so anywhere
    for where, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Quantizer):
                kinds[parameter] = "steps"
                if relative_step_lr is not None:
                    kinds[parameter] = f"steps/{where}"
                    rate = relative_step_lr * float(module.initial_step.median())
                    groups[kinds[parameter]] = {"params": [], "lr": rate, "weight_decay": 0.0}
            elif isinstance(module, _NORMS) or name.endswith("bias") or parameter.ndim < 2:
                kinds.setdefault(parameter, "no_decay")
    for parameter in model.parameters():
        kind = kinds.get(parameter, LOW_BIT if parameter in low else "weights")
        group = {"params": [], "lr": lr, "weight_decay": weight_decay}
        factor = DECAY_FACTORS.get(bits.get(parameter, 8)) if weight_decay_by_bits else None
        if kind in ("weights", LOW_BIT) and factor is not None:
            kind = f"{kind}/{bits[parameter]}bit"
            group["weight_decay"] *= factor
        groups.setdefault(kind, group)["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items()]
