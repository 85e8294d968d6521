"""Parameter groups for any torch optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from lsquant.nn import quantized_layers
from lsquant.quantizer import Quantizer

# The factor on the decay by the bits of the weight; 1 for 4 bits and more. LSQ (arXiv:1902.08153), section 3:
# 1e-4 at 4 and 8 bits, 0.5e-4 at 3, 0.25e-4 at 2.
DECAY_FACTORS = {2: 0.25, 3: 0.5}

_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    step_lr: float | None = None,
    weight_decay_by_bits: bool = False,
) -> list[dict[str, Any]]:
    """Groups "weights", "no_decay" and "steps" that hold every parameter of `model` exactly once.

    steps:    the steps and offsets of all quantizers: never decayed, learning rate `step_lr` (None: `lr`)
    no_decay: biases, the parameters of normalisation layers, and whatever has fewer than two dimensions
    weights:  everything else, decayed by `weight_decay` as given; with `weight_decay_by_bits` the weights of 2- and
              3-bit layers are groups of their own, "weights/2bit" and "weights/3bit", with 0.25 and 0.5 times that

    For Adam-type optimizers the gradient scale g cancels: `step_lr` then decides how fast the steps move.
    """
    bits: dict[int, int] = {}
    if weight_decay_by_bits:
        for _, layer in quantized_layers(model):
            if layer.weight_quantizer is not None:
                bits[id(layer.weight)] = layer.weight_quantizer.spec.bits

    groups: dict[str, dict[str, Any]] = {
        "weights": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "no_decay": {"params": [], "lr": lr, "weight_decay": 0.0},
        "steps": {"params": [], "lr": lr if step_lr is None else step_lr, "weight_decay": 0.0},
    }
    kinds: dict[int, str] = {}  # a parameter that is shared is a step or a norm's if it is so anywhere
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Quantizer):
                kinds[id(parameter)] = "steps"
            elif isinstance(module, _NORMS) or name.endswith("bias") or parameter.ndim < 2:
                kinds.setdefault(id(parameter), "no_decay")
    for parameter in model.parameters():
        kind = kinds.get(id(parameter), "weights")
        factor = DECAY_FACTORS.get(bits.get(id(parameter), 8))
        if kind == "weights" and factor is not None:
            kind = f"weights/{bits[id(parameter)]}bit"
            groups.setdefault(kind, {"params": [], "lr": lr, "weight_decay": weight_decay * factor})
        groups[kind]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items()]
