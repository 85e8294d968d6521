"""``calibrate``: set every activation step from data, decide signs, freeze N; refuse to leave one unset."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.batches import (
    Forward,
    evaluating,
    observing_inputs,
    require_one_process,
    run_batch,
    take,
    trained_model,
)
from lsquant._util.errors import UsageError
from lsquant._util.rollback import unchanged_on_error
from lsquant._util.tensors import on_meta
from lsquant.convert import disabled, multiplies
from lsquant.mse import ValueSummary
from lsquant.nn import QuantizedLayer, input_elements, lone_quantizers, quantized_layers, quantizers, stored_quantizers
from lsquant.quantizer import Method, Quantizer
from lsquant.tying import weight_quantizers


class _Observer:
    """What calibration keeps of one activation quantizer: a bounded summary of its values, and N."""

    def __init__(self, name: str, quantizer: Quantizer) -> None:
        self.name = name
        self.quantizer = quantizer
        self.summaries = [ValueSummary() for _ in range(quantizer.step.numel())]
        self.elements = 0  # N, from the first batch

    def of_layer(self, layer: QuantizedLayer) -> Callable[[Tensor], None]:
        """Return the function that takes in an input of this layer, one of those that have the quantizer."""
        return lambda x: self.observe(x, input_elements(layer, x))

    def of_stored(self, x: Tensor) -> None:
        """Take in a stored tensor, (batch, ...)."""
        self.observe(x, x[0].numel() if x.dim() > 1 and len(x) else 0)

    def observe(self, x: Tensor, elements: int = 0) -> None:
        """Take in one input; an empty one says nothing.  elements: N of it, 0 for a stand-alone quantizer."""
        if not x.numel():
            return
        try:
            self.quantizer.summarize(x, self.summaries)
        except UsageError as error:
            raise UsageError(
                f"calibrate: at {self.name!r} {error}; clean the data, or look at the layer before"
            ) from error
        self.elements = self.elements or elements

    def check(self) -> None:
        """Raise UsageError where no step can be set from what was observed."""
        if not self.summaries[0].total:
            raise UsageError(
                f"calibrate: layer {self.name!r} was not reached by any batch with values, its step would be left "
                "unset; give batches that reach it, or leave it in floating point (skip=)"
            )
        if all(s.low == s.high == 0.0 for s in self.summaries):
            raise UsageError(
                f"calibrate: all input values of layer {self.name!r} are zero, no step can be set; check the data and "
                "the layers before, or leave it in floating point (skip=)"
            )
        if not (self.quantizer.elements_per_step or self.elements):
            raise UsageError(
                f"calibrate: {self.name!r} is a stand-alone Quantizer without N; give Quantizer(..., count=N)"
            )

    def initialized(self, method: Method) -> Quantizer:
        """Return a copy of the quantizer with N and step set.  Raises: UsageError where there is none."""
        ready = copy.deepcopy(self.quantizer)
        if not ready.elements_per_step:
            ready.set_count(self.elements)
        ready.initialize_from(self.summaries, method)
        return ready


class _Moments:
    """The mean square of every input feature, or channel, of the layers that have one weight."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def of(self, layer: QuantizedLayer) -> Callable[[Tensor], None]:
        """Return the function that takes in an input of a layer."""
        dims = layer.weight.dim()
        if dims == 2:
            return lambda x: self.add(x, x.dim() - 1)
        return lambda x: self.add(x, x.dim() - dims + 1)  # a convolution, also of an input without a batch

    def add(self, x: Tensor, axis: int) -> None:
        rows = x.detach().movedim(axis, 0).flatten(1).double()
        squares = rows.square().sum(1)
        self.total = squares if self.total is None else self.total + squares

    def mean(self, name: str) -> Tensor | None:
        """Return (inputs,) float32, the largest 1; None where nothing was seen, or only zeros.

        Raises: UsageError naming the layer for NaN or infinite inputs.
        """
        if self.total is None or not bool(self.total.any()):
            return None
        if not bool(torch.isfinite(self.total).all()):
            raise UsageError(
                f"calibrate: the inputs of {name!r} are NaN or infinite; clean the data, or look at the layer before"
            )
        return (self.total / self.total.max()).float()


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int | None = 32,
    forward: Forward | None = None,
    method: Method = "mse",
    weights: Method | None = None,
    importance: bool = False,
    again: bool = False,
) -> None:
    """Set the step of every activation quantizer that has none from the float model's values on some batches.

    N is frozen from the first batch; a sign is decided True when any value is below 0.  Inputs without elements, as of
    an empty batch, are passed over.  The mode is restored.

    model: prepared.
    batches: an iterable of batches (a tensor; a tuple or list, whose first element counts; a mapping,
        ``model(**batch)``), or of anything with ``forward=``.
    max_batches: read at most so many; None: all.
    forward: ``forward(model, batch)`` runs the model on one batch.
    method: "mse", the step of least squared error (at most 1.001 times the best of 2,000 log-spaced steps), or "paper".
    weights: set weight steps by this rule, but only those that have not been trained; with ``again`` all.  None leaves
        them as ``prepare`` set them: by "paper", or by "mse" where the input is not quantized and for groups.  "paper"
        suits training, but spends 8 bits on a range that hardly any weight reaches; use "mse" where nothing is trained
        afterwards.
    importance: with ``weights="mse"``: weigh the squared error of a weight by the mean square of what it is multiplied
        with on these batches (for a convolution, that of its input channel), so that the error of the layer's output
        counts.
    again: set the steps of all inputs anew, with their signs, and with ``weights`` those of all weights: what was
        learned of them is lost.  Without it, a call that finds every step set warns.
    Raises: UsageError naming the layer for NaN, infinite, all-zero or missing values, for a wrong guess of the first or
        last layer, and when a quantizer would be left without a step.  Whatever is raised, a KeyboardInterrupt too,
        the model is then unchanged.
    """
    model = _check_arguments(model, method, weights, importance, again)
    # everything is computed before anything is changed: (quantizer, a copy of it that is set)
    with unchanged_on_error(model.modules(), values=False):
        wanted = _weights_to_set(model, weights, again)
        moments: dict[Quantizer, _Moments] = {}
        found = [] if importance else [(q, _weight_step(layer, q, weights)) for q, layer in wanted]
        observers: dict[Quantizer, _Observer] = {}
        watched: list[tuple[nn.Module, Callable[[Any], object]]] = []
        for name, layer in quantized_layers(model):
            if layer.input_quantizer is not None and (again or not layer.input_quantizer.is_initialized):
                observer = observers.setdefault(layer.input_quantizer, _Observer(name, layer.input_quantizer))
                watched.append((layer, observer.of_layer(layer)))
        stored = stored_quantizers(model)
        for name, quantizer in quantizers(model):
            if quantizer in stored and (again or not quantizer.is_initialized):
                observer = observers.setdefault(quantizer, _Observer(name, quantizer))
                watched.append((quantizer, observer.of_stored))
        for name, quantizer in lone_quantizers(model):
            if quantizer not in stored and (again or not quantizer.is_initialized):
                observers[quantizer] = _Observer(name, quantizer)
                watched.append((quantizer, observers[quantizer].observe))
        if importance:
            moments = {q: _Moments() for q, _ in wanted}
            watched += [(m, moments[m.weight_quantizer].of(m)) for _, m in quantized_layers(model)
                        if m.weight_quantizer in moments and m.takes_codes]  # fmt: skip
        order: dict[nn.Module, None] = {}
        for module in model.modules():
            if multiplies(module):
                watched.append((module, lambda _, module=module: order.setdefault(module)))
        with observing_inputs(watched), disabled(model), evaluating(model):
            for batch in take(batches, max_batches):
                run_batch(model, batch, forward)
        _check_order(model, list(order))
        for observer in observers.values():
            observer.check()
        if importance:
            names = {q: name for q, (name, _) in weight_quantizers(model).items()}
            found = [(q, _weight_step(layer, q, weights, moments[q].mean(names[q]))) for q, layer in wanted]
            if unseen := [names[q] for q, _ in wanted if moments[q].total is None]:
                warnings.warn(
                    f"calibrate: nothing reached {', '.join(unseen)}: all errors of these weights count alike",
                    stacklevel=2,
                )
        found += [(observer.quantizer, observer.initialized(method)) for observer in observers.values()]
        with unchanged_on_error(quantizer for quantizer, _ in found):
            for quantizer, ready in found:
                quantizer.adopt(ready)
    if not found and _activation_quantizers(model):
        warnings.warn(
            "calibrate: every step is set already and none was changed; again=True sets all of them anew", stacklevel=2
        )


def _activation_quantizers(model: nn.Module) -> list[Quantizer]:
    of_layers = [layer.input_quantizer for _, layer in quantized_layers(model) if layer.input_quantizer is not None]
    return of_layers + [quantizer for _, quantizer in lone_quantizers(model)]


def _check_arguments(model: nn.Module, method: Any, weights: Any, importance: Any, again: Any) -> nn.Module:
    model = require_one_process(
        model,
        "calibrate",
        "with the same batches in every process; or calibrate .module and call lsquant.integrations.distributed."
        "synchronize on it",
    )
    model = trained_model(model)
    for name, flag in (("importance", importance), ("again", again)):
        if type(flag) is not bool:
            raise UsageError(f"calibrate: {name}={flag!r}; it must be True or False")
    if importance and weights != "mse":
        raise UsageError(f"calibrate: importance=True goes with weights='mse', not weights={weights!r}")
    if not any(True for _ in quantizers(model)):
        raise UsageError("calibrate: the model has no quantizers; call lsquant.prepare(model, recipe) first")
    if empty := on_meta(model):
        raise UsageError(f"calibrate: {empty[0]!r} is on the meta device and holds no values; load a state first")
    for name, rule in (("method", method), ("weights", weights or "paper")):
        if rule not in ("mse", "paper"):
            raise UsageError(f"calibrate: {name}={rule!r}; use 'mse' or 'paper'")
    return model


def _weights_to_set(model: nn.Module, rule: Method | None, again: bool) -> list[tuple[Quantizer, QuantizedLayer]]:
    """List weight quantizers and layers: where ``prepare`` could set no step, and those that a rule is for.

    A rule is for the steps that are still the initial ones, bit for bit, or with ``again`` for all.
    """

    def is_wanted(q: Quantizer) -> bool:
        if not q.is_initialized:
            return True
        return rule is not None and (again or torch.equal(q.step.detach(), q.initial_step))

    return [(q, layer) for q, (_, layer) in weight_quantizers(model).items() if is_wanted(q)]


def _weight_step(
    layer: QuantizedLayer, quantizer: Quantizer, rule: Method | None, moments: Tensor | None = None
) -> Quantizer:
    """Return a copy of the weight's quantizer with its step set.  Raises: UsageError for weights that give none."""
    ready = copy.deepcopy(quantizer)
    try:
        layer.set_weight_step(ready, rule or layer.first_rule(quantizer), moments)
    except UsageError as error:
        raise UsageError(f"calibrate: {error}; is the trained float model loaded?") from error
    return ready


def _check_order(model: nn.Module, order: list[nn.Module]) -> None:
    """Raise UsageError where the first or last layer, guessed from the order of definition, is not executed there."""
    names = {module: name for name, module in model.named_modules()}
    for index, which in ((0, "first"), (-1, "last")):
        assumed = [m for _, m in quantized_layers(model) if which in getattr(m, "assumed_position", ())]
        if order and assumed and assumed[0] is not order[index]:
            raise UsageError(
                f"calibrate: {names[assumed[0]]!r} was taken for the {which} layer (order of definition), but "
                f"{names[order[index]]!r} is executed {which}; call prepare(model, recipe, example_inputs=batch) "
                "with a batch, so that the order is known"
            )
