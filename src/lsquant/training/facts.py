"""What the loop writes about every quantizer, taken between backward and the optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lsquant._util.batches import evaluating, run_batch, take
from lsquant.nn import quantized_layers
from lsquant.quantizer import Quantizer
from lsquant.reference import step_balance, step_view


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
    counts: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, layer in quantized_layers(model):
        prefix = f"{name}." if name else ""
        if layer.weight_quantizer is not None:
            counts[f"{prefix}weight_quantizer"] = [_clipped(layer.weight_quantizer, layer.weight)]
        if layer.input_quantizer is not None:
            found = counts[f"{prefix}input_quantizer"] = []

            def look(module: nn.Module, args: tuple[Any, ...], found: list[torch.Tensor] = found) -> None:
                found.append(_clipped(module.input_quantizer, args[0]))  # pyright: ignore[reportArgumentType]

            handles.append(layer.register_forward_pre_hook(look))
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
