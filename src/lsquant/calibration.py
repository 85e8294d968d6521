"""``calibrate``: set every activation step from data, decide signs, freeze N; refuse to leave one unset."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lsquant._util.batches import Forward, evaluating, first_input, run_batch, take, unwrapped
from lsquant._util.errors import UsageError
from lsquant.convert import disabled, multiplies
from lsquant.mse import ValueSummary
from lsquant.nn import QuantizedLayer, lone_quantizers, quantized_layers, quantizers
from lsquant.quantizer import Method, Quantizer


class _Observer:
    """What calibration keeps of one activation quantizer: a bounded summary of its values, and N."""

    def __init__(self, name: str, quantizer: Quantizer) -> None:
        self.name, self.quantizer = name, quantizer
        self.summaries, self.features = [ValueSummary() for _ in range(quantizer.step.numel())], 0

    def take(self, x: Tensor, features: int) -> None:
        if not x.numel():
            raise UsageError(f"calibrate: {self.name!r} got an empty batch of shape {tuple(x.shape)}")
        try:
            self.quantizer.summarize(x, self.summaries)
        except UsageError as error:
            raise UsageError(
                f"calibrate: at {self.name!r} {error}; clean the data, or look at the layer before"
            ) from error
        self.features = self.features or features

    def initialized(self, method: Method) -> Quantizer:
        """A copy of the quantizer with N and step set.  Raises: UsageError where there is none."""
        ready = copy.deepcopy(self.quantizer)
        if not ready.elements_per_step:
            ready.set_count(self.features)
        ready.initialize_from(self.summaries, method)
        return ready


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int | None = 32,
    forward: Forward | None = None,
    method: Method = "mse",
    weights: Method | None = None,
) -> None:
    """Set the step of every activation quantizer from the float model's values on some batches.

    batches: an iterable of batches (a tensor; a tuple or list, whose first element counts; a mapping,
    ``model(**batch)``), or of anything with ``forward=lambda model, batch: ...``.  max_batches: read at most so many.
    method: "mse", the step of least squared error (at most 1.001 times the best of 2,000 log-spaced steps), or "paper".
    weights: a rule that sets the weight steps anew; None leaves them as ``prepare`` set them, by "paper", which suits
    training, but spends 8 bits on a range that hardly any weight reaches: "mse" where nothing is trained afterwards.
    N is frozen from the first batch; a sign is decided True when any value is below 0.  The mode is restored.
    Raises: UsageError naming the layer for NaN, infinite, all-zero or missing values, for a wrong guess of the first or
    last layer, and when a quantizer would be left without a step; the model's steps are then unchanged.
    """
    if unwrapped(model) is not model:
        raise UsageError(
            f"calibrate: calibrate the model before it is wrapped in {type(model).__name__}, with the same batches in "
            "every process; or calibrate .module and call lsquant.integrations.distributed.synchronize on it"
        )
    if not any(True for _ in quantizers(model)):
        raise UsageError("calibrate: the model has no quantizers; call lsquant.prepare(model, recipe) first")
    for name, rule in (("method", method), ("weights", weights or "paper")):
        if rule not in ("mse", "paper"):
            raise UsageError(f"calibrate: {name}={rule!r}; use 'mse' or 'paper'")
    observers: dict[Quantizer, _Observer] = {}
    order: dict[nn.Module, None] = {}
    hooks = []
    # everything is computed before anything is changed: (quantizer, a copy of it that is set)
    found = [(q, _weight_step(layer, q, weights or "paper")) for q, layer in _weights(model, weights).items()]
    for name, layer in quantized_layers(model):
        if layer.input_quantizer is not None:
            seen = observers.setdefault(layer.input_quantizer, _Observer(name, layer.input_quantizer))
            hooks.append(layer.register_forward_pre_hook(_watch(seen), with_kwargs=True))
    for name, quantizer in lone_quantizers(model):
        observers[quantizer] = seen = _Observer(name, quantizer)
        hooks.append(quantizer.register_forward_pre_hook(_watch(seen), with_kwargs=True))
    for module in model.modules():
        if multiplies(module):
            hooks.append(module.register_forward_pre_hook(lambda m, _: order.setdefault(m)))
    try:
        with disabled(model), evaluating(model):
            for batch in take(batches, max_batches):
                run_batch(model, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()
    _check_order(model, list(order))
    _check_seen(model, observers)
    found += [(seen.quantizer, seen.initialized(method)) for seen in observers.values()]
    for quantizer, ready in found:
        quantizer.adopt(ready)


def _watch(seen: _Observer) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs)
        seen.take(x, module.input_features(x) if isinstance(module, QuantizedLayer) else 0)

    return hook


def _weights(model: nn.Module, rule: Method | None) -> dict[Quantizer, QuantizedLayer]:
    """Layers by weight quantizer: all if there is a rule for them, else where ``prepare`` could not set the step."""
    layers = {layer.weight_quantizer: layer for _, layer in quantized_layers(model)}
    return {q: layer for q, layer in layers.items() if q is not None and (rule is not None or not q.is_initialized)}


def _weight_step(layer: QuantizedLayer, quantizer: Quantizer, rule: Method) -> Quantizer:
    """A copy of the weight's quantizer with its step set.  Raises: UsageError for weights that give none."""
    ready = copy.deepcopy(quantizer)
    try:
        ready.initialize(layer.rows(), rule)
    except UsageError as error:
        raise UsageError(f"calibrate: {error}; is the trained float model loaded?") from error
    return ready


def _check_order(model: nn.Module, order: list[nn.Module]) -> None:
    """Where first and last were guessed from the order of definition, compare with what was executed."""
    names = {module: name for name, module in model.named_modules()}
    for index, which in ((0, "first"), (-1, "last")):
        assumed = [m for _, m in quantized_layers(model) if which in getattr(m, "assumed_position", ())]
        if order and assumed and assumed[0] is not order[index]:
            raise UsageError(
                f"calibrate: {names[assumed[0]]!r} was taken for the {which} layer (order of definition), but "
                f"{names[order[index]]!r} is executed {which}; call prepare(model, recipe, example_inputs=batch) "
                "with a batch, so that the order is known"
            )


def _check_seen(model: nn.Module, observers: dict[Quantizer, _Observer]) -> None:
    for seen in observers.values():
        if not seen.summaries[0].total:
            raise UsageError(
                f"calibrate: layer {seen.name!r} was not reached by any batch, its step would be left unset; give "
                "batches that reach it, or leave it in floating point (skip=)"
            )
        if all(s.low == s.high == 0.0 for s in seen.summaries):
            raise UsageError(
                f"calibrate: all input values of layer {seen.name!r} are zero, no step can be set; check the data and "
                "the layers before, or leave it in floating point (skip=)"
            )
        if not (seen.quantizer.elements_per_step or seen.features):
            raise UsageError(
                f"calibrate: {seen.name!r} is a stand-alone Quantizer without N; give Quantizer(..., count=N)"
            )
