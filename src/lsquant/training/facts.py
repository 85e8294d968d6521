"""What the loop writes about every quantizer, taken between backward and the optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lsquant.nn import quantized_layers
from lsquant.quantizer import Quantizer
from lsquant.reference import step_balance


def quantizer_facts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """For every quantizer by name, e.g. "conv1.weight_quantizer":

    step:    the guarded step (the median if there are several; then step_min and step_max as well)
    R:       the median of (|dL/ds| / s) / (||dL/dw|| / ||w||) with the gradients that are there now; None without
    guarded: how many guarded steps the training forwards have met since the model was built

    Values are read from the device here: call it once an epoch, not in every iteration.
    """
    facts: dict[str, dict[str, Any]] = {}
    for name, layer in quantized_layers(model):
        for kind in ("weight_quantizer", "input_quantizer"):
            quantizer = getattr(layer, kind)
            if quantizer is not None:
                facts[f"{name}.{kind}" if name else kind] = _facts(layer, quantizer, kind == "weight_quantizer")
    return facts


@torch.no_grad()
def _facts(layer: nn.Module, quantizer: Quantizer, is_weight: bool) -> dict[str, Any]:
    step = quantizer.effective_step().detach()
    facts: dict[str, Any] = {"step": float(step.median())}
    if step.numel() > 1:
        facts |= {"step_min": float(step.min()), "step_max": float(step.max())}
    weight, grads = layer.weight, (layer.weight.grad, quantizer.step.grad)
    facts["R"] = None
    if grads[0] is not None and grads[1] is not None:
        layout = {"axis": quantizer.axis, "group_size": quantizer.spec.group_size} if is_weight else {}
        facts["R"] = float(step_balance(weight, grads[0], step, grads[1], **layout).median())
    facts["guarded"] = int(quantizer.guarded)
    return facts
