"""What each quantizer does to its values: clipping, levels used, entropy, signal-to-noise ratio, size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lsquant._util.batches import Forward, evaluating, observing_inputs, run_batch, take, trained_model, unwrapped
from lsquant._util.bits import packed_size
from lsquant.nn import QuantizedLayer, lone_quantizers, quantized_layers
from lsquant.quantizer import Quantizer
from lsquant.reference import code_of_quotient, quotient, step_balance, step_view


@dataclass(frozen=True)
class QuantizerFacts:
    """What one quantizer does to its values.

    layer: name of the layer, or of a quantizer that stands alone.
    kind: "weight" or "input" of a layer, or "alone".
    spec: in words.
    bits: 2 to 8.
    levels: how many codes there are.
    steps: their number.
    step, step_min, step_max: median, smallest and largest guarded step.
    initial_step: median of s0.
    count: N, the elements that share a step.
    elements: values looked at.
    clip_low, clip_high: share of the values with v/s below ``q_min - z``, above ``q_max - z``.
    levels_used: codes that occur.
    entropy: of the codes, in bits.
    sqnr: signal to quantization noise, ``10 log10(sum v^2 / sum (v - v_hat)^2)``, in dB; infinite without noise.
    balance: R, the median over the steps; None without gradients, and for a quantizer that stands alone.
    guarded: guarded steps met in training passes.
    size: bytes of the packed codes and steps of a layer's weight, else None.
    """

    layer: str
    kind: str
    spec: str
    bits: int
    levels: int
    steps: int
    step: float
    step_min: float
    step_max: float
    initial_step: float
    count: int
    elements: int
    clip_low: float
    clip_high: float
    levels_used: int
    entropy: float
    sqnr: float
    balance: float | None
    guarded: int
    size: int | None

    @property
    def name(self) -> str:
        """As in the state dict: ``layer.weight_quantizer``."""
        return self.layer if self.kind == "alone" else f"{self.layer}.{self.kind}_quantizer".lstrip(".")


class ValueStatistics:
    """Sums over the values of one quantizer and their codes, batch by batch.

    codes: (levels,) int64, how often each code occurs.
    low, high: values with v/s below ``q_min - z``, above ``q_max - z``.
    elements: values.
    signal, noise: ``sum v^2``, ``sum (v - v_hat)^2``.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        levels = quantizer.q_max - quantizer.q_min + 1
        self.codes = torch.zeros(levels, dtype=torch.int64)
        self.low = self.high = self.elements = 0
        self.signal = self.noise = 0.0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in values, in a shape that fits the step."""
        q = self.quantizer
        v, s = step_view(x.detach(), q.effective_step().detach(), q.axis, q.spec.group_size)
        zero = q.zero_point()
        z: Tensor | int = 0 if zero is None else zero.to(torch.float32).reshape(s.shape)
        vs = quotient(v, s)
        codes = code_of_quotient(v, vs, z, q.q_min, q.q_max)
        finite = torch.isfinite(codes)
        self.codes += torch.bincount((codes[finite] - q.q_min).long().cpu(), minlength=len(self.codes))
        self.low += int((vs < q.q_min - z).sum())
        self.high += int((vs > q.q_max - z).sum())
        self.elements += x.numel()
        self.signal += float(v.double().square().sum())
        self.noise += float((v.double() - (codes.double() - z) * s).square().sum())

    def facts(self, name: str, kind: str, layer: QuantizedLayer | None) -> QuantizerFacts:
        """Return what the sums say.  name, kind: as in ``QuantizerFacts``; layer: None for one that stands alone."""
        q, total = self.quantizer, max(self.elements, 1)
        share = self.codes[self.codes > 0].double() / max(int(self.codes.sum()), 1)
        step = q.effective_step().detach()
        packed = None
        if layer is not None and kind == "weight":
            zero_points = 0 if q.offset is None else step.numel()
            packed = packed_size(layer.weight.numel(), q.spec.bits, step.numel(), zero_points)
        return QuantizerFacts(
            layer=name,
            kind=kind,
            spec=str(q.spec),
            bits=q.spec.bits,
            levels=len(self.codes),
            steps=step.numel(),
            step=float(step.median()),
            step_min=float(step.min()),
            step_max=float(step.max()),
            initial_step=float(q.initial_step.median()),
            count=q.elements_per_step,
            elements=self.elements,
            clip_low=self.low / total,
            clip_high=self.high / total,
            levels_used=int((self.codes > 0).sum()),
            entropy=float(-(share * share.log2()).sum()) + 0.0,
            sqnr=10.0 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf,
            balance=None if layer is None else balance(layer, kind),
            guarded=int(q.guarded),
            size=packed,
        )


Statistics = TypeVar("Statistics", bound=ValueStatistics)


def balance(layer: QuantizedLayer, kind: str) -> float | None:
    """Return the median of R over the steps, from the gradients that are there now; None without gradients.

    kind: "weight" or "input".
    """
    quantizer = layer.weight_quantizer if kind == "weight" else layer.input_quantizer
    if quantizer is None or layer.weight.grad is None or quantizer.step.grad is None:
        return None
    layout = {"axis": quantizer.axis, "group_size": quantizer.spec.group_size} if kind == "weight" else {}
    weight, grad = layer.rows(), layer.to_rows(layer.weight.grad)
    ratio = step_balance(weight, grad, quantizer.effective_step(), quantizer.step.grad, **layout)
    ratio = ratio[torch.isfinite(ratio)]  # a dead channel has no gradient at all
    return float(ratio.median()) if ratio.numel() else None


def collect(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    max_batches: int | None = 32,
    forward: Forward | None = None,
) -> list[QuantizerFacts]:
    """Collect facts of every quantizer: layer by layer weight and input, then those that stand alone.

    The model runs in eval mode with its quantizers on, and is left as it was.

    batches: as for ``calibrate``; without them only the layers' weights are looked at.
    max_batches: read at most so many; None: all.
    forward: ``forward(model, batch)`` runs the model on one batch.
    Raises: UsageError for a step that is not set.
    """
    found = value_statistics(model, batches, ValueStatistics, max_batches=max_batches, forward=forward)
    return [statistics.facts(name, kind, layer) for (name, kind), (statistics, layer) in found.items()]


def value_statistics(
    model: nn.Module,
    batches: Iterable[Any] | None,
    make: Callable[[Quantizer], Statistics],
    *,
    max_batches: int | None = 32,
    forward: Forward | None = None,
) -> dict[tuple[str, str], tuple[Statistics, QuantizedLayer | None]]:
    """Collect as ``collect`` does, but return the statistics themselves, made by ``make(quantizer)``.

    Returns: (layer, kind) -> statistics, and the layer, None for a quantizer that stands alone.
    """
    model = trained_model(unwrapped(model))
    found: dict[tuple[str, str], tuple[Statistics, QuantizedLayer | None]] = {}
    watched: list[tuple[nn.Module, Callable[[Any], object]]] = []
    for name, layer in quantized_layers(model):
        if layer.weight_quantizer is not None:
            statistics = make(layer.weight_quantizer.require_initialized())
            statistics.add(layer.rows())
            found[name, "weight"] = statistics, layer
        if layer.input_quantizer is not None and batches is not None:
            statistics = make(layer.input_quantizer.require_initialized())
            found[name, "input"] = statistics, layer
            watched.append((layer, statistics.add))
    if batches is None:
        return found
    for name, quantizer in lone_quantizers(model):
        statistics = make(quantizer.require_initialized())
        found[name, "alone"] = statistics, None
        watched.append((quantizer, statistics.add))
    with observing_inputs(watched), evaluating(model):
        for batch in take(batches, max_batches):
            run_batch(model, batch, forward)
    return found
