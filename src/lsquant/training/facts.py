"""What is logged about every quantizer, taken between backward and the optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lsquant._util.batches import Forward
from lsquant.diagnostics import balance, collect
from lsquant.nn import QuantizedLayer, quantizers
from lsquant.quantizer import Quantizer
from lsquant.tying import quantizer_owners


def quantizer_facts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return facts about every quantizer by name, e.g. "conv1.weight_quantizer".

    step:    the guarded step (the median if there are several; then step_min and step_max as well)
    R:       the median of (|dL/ds| / s) / (||dL/dw|| / ||w||) with the gradients that are there now; None without, and
             for a quantizer that stands alone
    guarded: how many guarded steps the training forwards have met since the model was built

    Values are read from the device here: call it once an epoch, not in every iteration.
    """
    owners = quantizer_owners(model)  # R is taken against the weight of the first layer that has the quantizer
    return {name: _facts(q, owners[q][1] if q in owners else None) for name, q in quantizers(model)}


@torch.no_grad()
def _facts(quantizer: Quantizer, layer: QuantizedLayer | None) -> dict[str, Any]:
    step = quantizer.effective_step().detach()
    facts: dict[str, Any] = {"step": float(step.median())}
    if step.numel() > 1:
        facts |= {"step_min": float(step.min()), "step_max": float(step.max())}
    facts |= {"R": None, "guarded": int(quantizer.guarded)}
    if layer is not None:
        facts["R"] = balance(layer, "weight" if quantizer is layer.weight_quantizer else "input")
    return facts


def clip_rates(
    model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = 1, forward: Forward | None = None
) -> dict[str, dict[str, float]]:
    """Return {"clip_rate": ...} by quantizer: the share of the values beyond the outermost levels.

    clipped: v/s < q_min - z or v/s > q_max - z

    batches: of inputs, run in eval mode; no more than `max_batches`
    forward: as for `calibrate`
    """
    if not any(True for _ in quantizers(model)):
        return {}
    facts = collect(model, batches, max_batches=max_batches, forward=forward)
    return {f.name: {"clip_rate": f.clip_low + f.clip_high} for f in facts if f.elements}
