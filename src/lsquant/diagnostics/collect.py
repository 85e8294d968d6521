"""What each quantizer does to its values: clipping, levels used, entropy, signal-to-noise ratio, size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lsquant._util.batches import Forward, evaluating, first_input, run_batch, take
from lsquant.nn import QuantizedLayer, lone_quantizers, quantized_layers
from lsquant.quantizer import Quantizer
from lsquant.reference import code_of_quotient, quotient, step_balance, step_view


@dataclass(frozen=True)
class QuantizerFacts:
    """One quantizer.

    layer: name; kind: "weight" or "input" of a layer, or "alone" for a quantizer of that name that belongs to none.
    spec: in words; bits; levels: how many codes there are.
    steps: their number; step, step_min, step_max: median, smallest, largest guarded step; initial_step: median s0.
    count: N.  elements: values looked at.  clip_low, clip_high: share of them with v/s below ``q_min - z``, above
    ``q_max - z``.  levels_used: codes that occur; entropy: of the codes, in bits.  sqnr: signal to quantization noise,
    ``10 log10(sum v^2 / sum (v - v_hat)^2)``, in dB, infinite without noise.  balance: R, the median; None without
    gradients, and for one that stands alone.  guarded: guarded steps met in training passes.  size: bytes of the packed
    codes and steps of a layer's weight, else None.
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


class Tally:
    """Sums over the values of one quantizer, batch by batch."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        levels = quantizer.q_max - quantizer.q_min + 1
        self.codes = torch.zeros(levels, dtype=torch.int64)
        self.low = self.high = self.elements = 0
        self.signal = self.noise = 0.0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
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
        q, total = self.quantizer, max(self.elements, 1)
        share = self.codes[self.codes > 0].double() / max(int(self.codes.sum()), 1)
        step = q.effective_step().detach()
        packed = None
        if layer is not None and kind == "weight":
            packed = -(-layer.weight.numel() * q.spec.bits // 8) + 4 * step.numel()
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


T = TypeVar("T", bound=Tally)


def balance(layer: QuantizedLayer, kind: str) -> float | None:
    """The median of R over the steps, from the gradients that are there now; None without."""
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
    """Facts of every quantizer, layer by layer weight and input in order of definition, then those that stand alone.

    batches: as for ``calibrate``; without them only the layers' weights are looked at.  The model runs in eval mode
    with its quantizers on, and is left as it was.  Raises: UsageError for a step that is not set.
    """
    found = tallied(model, batches, Tally, max_batches=max_batches, forward=forward)
    return [tally.facts(name, kind, layer) for (name, kind), (tally, layer) in found.items()]


def tallied(
    model: nn.Module,
    batches: Iterable[Any] | None,
    make: Callable[[Quantizer], T],
    *,
    max_batches: int | None = 32,
    forward: Forward | None = None,
) -> dict[tuple[str, str], tuple[T, QuantizedLayer | None]]:
    """As ``collect``, the tallies themselves, made by ``make(quantizer)``: (layer, kind) -> tally and layer."""
    tallies: dict[tuple[str, str], tuple[T, QuantizedLayer | None]] = {}
    hooks = []
    for name, layer in quantized_layers(model):
        if layer.weight_quantizer is not None:
            tally = make(layer.weight_quantizer.require_initialized())
            tally.add(layer.rows())
            tallies[name, "weight"] = tally, layer
        if layer.input_quantizer is not None and batches is not None:
            tally = make(layer.input_quantizer.require_initialized())
            tallies[name, "input"] = tally, layer
            hooks.append(layer.register_forward_pre_hook(_watch(tally), with_kwargs=True))
    for name, quantizer in lone_quantizers(model) if batches is not None else ():
        tally = make(quantizer.require_initialized())
        tallies[name, "alone"] = tally, None
        hooks.append(quantizer.register_forward_pre_hook(_watch(tally), with_kwargs=True))
    try:
        if batches is not None:
            with evaluating(model):
                for batch in take(batches, max_batches):
                    run_batch(model, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()
    return tallies


def _watch(tally: Tally) -> Any:
    return lambda module, args, kwargs: tally.add(first_input(args, kwargs))
