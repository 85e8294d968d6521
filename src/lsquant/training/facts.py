"""What the loop writes about every quantizer, taken between backward and the optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lsquant._util.batches import evaluating, run_batch, take
from lsquant.diagnostics import balance
from lsquant.nn import QuantizedLayer, quantized_layers, quantizers
from lsquant.quantizer import Quantizer
from lsquant.reference import step_view


def quantizer_facts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """For every quantizer by name, e.g. "conv1.weight_quantizer":

    step:    the guarded step (the median if there are several; then step_min and step_max as well)
    R:       the median of (|dL/ds| / s) / (||dL/dw|| / ||w||) with the gradients that are there now; None without, and
             for a quantizer that stands alone
    guarded: how many guarded steps the training forwards have met since the model was built

    Values are read from the device here: call it once an epoch, not in every iteration.
    """
    owners = _owners(model)
    return {name: _facts(quantizer, owners.get(quantizer)) for name, quantizer in quantizers(model)}


def _owners(model: nn.Module) -> dict[Quantizer, QuantizedLayer]:
    """The layer whose weight R is taken against; for a shared weight the first one."""
    owners: dict[Quantizer, QuantizedLayer] = {}
    for _, layer in quantized_layers(model):
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None:
                owners.setdefault(quantizer, layer)
    return owners


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
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int | None = 1,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, dict[str, float]]:
    """{"clip_rate": share of the values beyond the outermost levels, v/s < q_min - z or v/s > q_max - z} by quantizer.

    Weights are looked at as they are, inputs in eval mode over the first `max_batches` batches.
    """
    owners = _owners(model)
    counts: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, quantizer in quantizers(model):
        found: list[torch.Tensor] = []
        counts[name] = found
        layer = owners.get(quantizer)
        if layer is not None and quantizer is layer.weight_quantizer:
            found.append(_clipped(quantizer, layer.rows()))
            continue

        def look(_: nn.Module, args: Any, q: Quantizer = quantizer, found: list[torch.Tensor] = found) -> None:
            found.append(_clipped(q, args[0]))

        handles.append((quantizer if layer is None else layer).register_forward_pre_hook(look))
    try:
        if handles:
            with evaluating(model):
                for batch in take(batches, max_batches):
                    run_batch(model, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    return {name: {"clip_rate": float(torch.stack(found).mean())} for name, found in counts.items() if found}


@torch.no_grad()
def _clipped(quantizer: Quantizer, values: torch.Tensor) -> torch.Tensor:
    """() float64: the share of `values` beyond the outermost levels."""
    zero = quantizer.zero_point()
    low, high = ((torch.tensor(q) - (0 if zero is None else zero)) for q in (quantizer.q_min, quantizer.q_max))
    v, s = step_view(values, quantizer.effective_step(), quantizer.axis, quantizer.spec.group_size)
    low, high = (bound.to(s).expand(quantizer.step.shape).reshape(s.shape) for bound in (low, high))
    return (((v / s) < low) | ((v / s) > high)).to(torch.float64).mean()
