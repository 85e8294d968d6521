"""What ``check`` says of values: batches are run, and the values of every quantizer are looked at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.batches import Forward, evaluating, first_input, run_batch, take
from lsquant._util.bypass import BypassDetector, address
from lsquant.convert import disabled, multiplies
from lsquant.diagnostics import symptoms
from lsquant.diagnostics.collect import ValueStatistics
from lsquant.diagnostics.findings import Finding, finding, findings
from lsquant.nn import QuantizedLayer, lone_quantizers, quantized_layers, quantizers
from lsquant.quantizer import Quantizer
from lsquant.reference import initial_step, quotient, step_view
from lsquant.tying import weight_quantizers

ENOUGH = 16
"""Values per level from which on unused levels mean something."""
TOO_LARGE = 2.0
"""Times the paper's rule: a weight's step from which on unused levels are a finding."""


def check_values(
    model: nn.Module,
    batches: Iterable[Any],
    sound: dict[str, Quantizer],
    max_batches: int | None,
    forward: Forward | None,
    on_levels: set[str],
) -> Iterator[Finding]:
    """Run the batches; check the values of every quantizer, BatchNorm's statistics and that every layer is called.

    sound: quantizers by name whose steps are set and finite.  The model runs in eval mode, and is left as it was.
    on_levels: gets the names of quantizers all of whose values lie exactly on levels.
    """
    observed = _Run(model, sound)
    observed.run(batches, max_batches, forward)
    yield from observed.layers_not_called()
    yield from observed.assumed_otherwise()
    owners = weight_quantizers(model)
    for name, q in sound.items():
        values = observed.values[q]
        if values.elements:
            if values.are_on_levels:
                on_levels.add(name)
            yield from _check_quantizer(name, q, values, owners[q][1] if q in owners else None)
    for name, statistics in observed.norms.items():
        yield from findings(name, statistics.symptoms())


class _Values(ValueStatistics):
    """Statistics that also know the lowest value, and how many are exactly 0."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.lowest = math.inf
        self.zeros = 0
        self.are_on_levels = True
        self.float_values = symptoms.CalibrationFit(quantizer)

    def add(self, x: Tensor) -> None:
        super().add(x)
        if x.numel():
            self.lowest = min(self.lowest, float(x.detach().min()))
            self.zeros += int((x.detach() == 0).sum())
            self.are_on_levels = self.are_on_levels and self._on_levels(x.detach())

    def _on_levels(self, x: Tensor) -> bool:
        """Tell whether the step gets no gradient from these values: all levels, and none an outermost beside 0."""
        q = self.quantizer
        if q.offset is not None:
            return False
        v, s = step_view(x, q.effective_step().detach(), q.axis, q.spec.group_size)
        codes = quotient(v, s)
        inside = (codes < q.q_max) & ((codes > q.q_min) | (codes == 0))
        return bool(((codes == codes.round()) & inside).all())


class _Run:
    """Batches run with hooks that see every quantizer's values, every call of a layer, and every bypassed layer.

    A batch runs once in floating point, as ``calibrate`` saw it, while some step is as calibration left it, and once
    quantized.
    """

    def __init__(self, model: nn.Module, sound: dict[str, Quantizer]) -> None:
        self.model = model
        self.layers = dict(quantized_layers(model))
        self.values = {q: _Values(q) for q in sound.values()}
        self.norms = {
            name: statistics
            for name, module in model.named_modules()
            if (statistics := symptoms.batchnorm_statistics(module)) is not None
        }
        self.calls: dict[str, int] = {}
        self.order: dict[str, None] = {}  # layers as they were called first
        self.running: list[str] = []  # names of the layers that are being computed
        self.in_float = False
        weights = {address(m.weight): name for name, m in self.layers.items() if m.weight_quantizer is not None}
        self.bypass = BypassDetector(weights, self.running)

    def run(self, batches: Iterable[Any], max_batches: int | None, forward: Forward | None) -> None:
        """Run all batches.  Quantizers whose step is not sound are off: they would stop the run, or make it all NaN."""
        for q, (_, layer) in weight_quantizers(self.model).items():
            if q in self.values:
                self.values[q].add(layer.rows())
        unsound = [q for _, q in quantizers(self.model) if q.enabled and q not in self.values]
        calibrated = any(values.float_values.is_judged for values in self.values.values())
        hooks = self._hooks()
        try:
            for q in unsound:
                q.enabled = False
            with evaluating(self.model), torch.compiler.set_stance("force_eager"), self.bypass:
                for batch in take(batches, max_batches):
                    if calibrated:
                        self.in_float = True
                        with disabled(self.model):
                            run_batch(self.model, batch, forward)
                        self.in_float = False
                    run_batch(self.model, batch, forward)
        finally:
            for q in unsound:
                q.enabled = True
            for hook in hooks:
                hook.remove()

    def _hooks(self) -> list[Any]:
        hooks: list[Any] = []
        for name, layer in self.layers.items():
            hooks += self._watch(name, layer, layer.input_quantizer)
        for name, q in lone_quantizers(self.model):
            hooks += self._watch(name, q, q)
        for statistics in self.norms.values():
            hooks.append(statistics.module.register_forward_pre_hook(self._batchnorm_hook(statistics)))
        return hooks

    def _watch(self, name: str, module: nn.Module, quantizer: Quantizer | None) -> list[Any]:
        self.calls[name] = 0
        values = self.values.get(quantizer) if quantizer is not None else None

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.running.append(name)
            if not self.in_float:
                self.calls[name] += 1
                self.order.setdefault(name)
            if values is not None:
                observe = values.float_values.add if self.in_float else values.add
                observe(first_input(args, kwargs))

        def leave(*_: Any) -> None:
            del self.running[-1:]

        entered = module.register_forward_pre_hook(enter, with_kwargs=True)
        return [entered, module.register_forward_hook(leave, always_call=True)]

    def _batchnorm_hook(self, statistics: symptoms.BatchNormStatistics) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not self.in_float:
                statistics.add(args[0])

        return hook

    def assumed_otherwise(self) -> Iterator[Finding]:
        """Yield layers that got their bits as the first or last one, which another one is in execution order.

        ``calibrate`` refuses this; a recipe for weights alone needs no ``calibrate``.
        """
        order = [name for name in self.order if name in self.layers and multiplies(self.layers[name])]
        for index, which in ((0, "first"), (-1, "last")):
            for name, layer in self.layers.items():
                if name in order and which in getattr(layer, "assumed_position", ()) and name != order[index]:
                    really = order[index]
                    text = f"it got its bits as the {which} layer, by order of definition, but {really!r} runs {which}"
                    yield finding("order_assumed", name, text, really=really)

    def layers_not_called(self) -> Iterator[Finding]:
        """Yield layers that are bypassed, or not reached by any batch."""
        called = [name for name, count in self.calls.items() if count and name in self.layers]
        reached = {q for name in called for q in self.layers[name].own_quantizers()}
        for name, count in self.calls.items():
            if function := self.bypass.found.get(name):
                text = f"its quantized weight is used by {function} without calling the layer, in floating point"
                yield finding("bypassed", name, text, function=function, calls=count)
                continue
            # a tied layer that is called trains the quantizers of one that is not
            stands_in = name in self.layers and set(self.layers[name].own_quantizers()) <= reached
            if not count and not stands_in:
                yield finding("not_reached", name, "no batch reaches it, its steps get no gradient from such data")


def _check_quantizer(name: str, q: Quantizer, values: _Values, owner: QuantizedLayer | None) -> Iterator[Finding]:
    """Yield clipped values and unused levels of one quantizer.  owner: the layer, for a weight."""
    bits, step = q.spec.bits, float(q.step.detach().median())
    levels = len(values.codes)
    if not math.isfinite(values.signal + values.noise):
        yield finding("values_not_finite", name, "some of its values are NaN or infinite")
        return
    if owner is not None:
        yield from findings(name, symptoms.of_weight(q, owner.rows().detach()))
    else:
        yield from findings(name, values.float_values.symptoms())
    nonzero = max(values.elements - values.zeros, 1)
    low, high = values.low / nonzero, values.high / nonzero
    if negative := list(findings(name, symptoms.of_sign(q, values, values.lowest))):
        yield from negative
    elif low + high > max(0.2, 2.0 ** (1 - bits)):
        text = f"{low + high:.0%} of its values other than 0 lie beyond the outermost of its {levels} levels"
        yield finding("clipped", name, text, clip_low=low, clip_high=high, bits=bits, step=step)
    used = torch.nonzero(values.codes).flatten() + q.q_min
    # as good as lossless at these bits (10 log10(4^bits) dB and better): few levels are enough, as for 8-bit pixels
    lossless = values.noise * 4.0**bits < values.signal
    if values.elements < ENOUGH * levels or not len(used) or lossless:
        return
    if owner is not None and not _step_is_too_large(q, owner):
        return
    first, last = int(used[0]), int(used[-1])
    span = f"its codes go from {first} to {last} only, of {q.q_min} to {q.q_max}"
    evidence = {"lowest": first, "highest": last, "levels": levels, "step": step}
    if q.offset is not None:
        reach = (last - first + 1) / levels
    else:
        reach = max(last / q.q_max, first / q.q_min if q.q_min else 0.0)
    if reach <= 0.5:
        yield finding("unused_levels", name, span, **evidence)
    elif few := list(findings(name, symptoms.of_levels(q, values))):
        yield from few
    elif owner is None and q.q_min < 0 <= values.lowest and q.offset is None:
        yield finding("signed_in_vain", name, f"{span}: its values are never below 0, but it is signed", **evidence)


def _step_is_too_large(q: Quantizer, owner: QuantizedLayer) -> bool:
    usual = initial_step(owner.rows().detach(), q.q_max, axis=q.axis, group_size=q.spec.group_size)
    return float((q.effective_step().detach() / usual.to(q.step)).median()) > TOO_LARGE
