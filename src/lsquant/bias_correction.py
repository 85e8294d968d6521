"""``correct_bias``: what quantization shifts on average is taken back, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lsquant._util.batches import Forward, evaluating, require_one_process, run_batch, take, trained_model, uncompiled
from lsquant._util.errors import UsageError
from lsquant._util.rollback import unchanged_on_error
from lsquant.convert import disabled
from lsquant.nn import QuantizedLayer, quantized_layers

Place = nn.Parameter | Tensor


def correct_bias(
    model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = 8, forward: Forward | None = None
) -> dict[str, float]:
    """Add to the bias of every quantized layer the mean error of its output on some batches, channel by channel.

    ``b <- b + E[y_float - y]``, layer by layer in order of execution, each with those before it corrected.  A layer
    without a bias is corrected in the running mean of the BatchNorm that reads its output; one that has neither is left
    as it is.  It changes biases and running means, nothing else.

    model: prepared and calibrated; in eval mode inside.
    batches: as for ``calibrate``; all are kept and read twice for every layer.
    max_batches: read at most so many; None: all.
    forward: ``forward(model, batch)`` runs the model on one batch.
    Returns: layer -> the largest correction of a channel, in units of the standard deviation of its output.
    Raises: UsageError for a model without quantizers, or with a step that is not set; the model is then unchanged.
    Source: Nagel et al., arXiv:1906.04721, section 4.2.
    """
    model = trained_model(require_one_process(model, "correct_bias"))
    layers = {layer: name for name, layer in quantized_layers(model)}
    if not layers:
        raise UsageError("correct_bias: the model has no quantized layer; call lsquant.prepare(model, recipe) first")
    for layer in layers:
        for quantizer in layer.own_quantizers():
            quantizer.require_initialized()
    kept, found = list(take(batches, max_batches)), {}
    with unchanged_on_error(model.modules(), values=True), evaluating(model), uncompiled():
        places, order = _places(model, list(layers), kept[0], forward)
        with disabled(model):
            wanted = _moments(model, order, kept, forward)
        for layer in order:
            if layer not in places:
                continue
            mean, deviation = wanted[layer]
            error = mean - _moments(model, [layer], kept, forward)[layer][0]
            place, sign = places[layer]
            place += sign * error.to(place.dtype)
            found[layers[layer]] = float((error.abs() / deviation.clamp(min=1e-12)).max())
    return found


def _places(
    model: nn.Module, layers: Sequence[QuantizedLayer], batch: Any, forward: Forward | None
) -> tuple[dict[QuantizedLayer, tuple[Tensor, int]], list[QuantizedLayer]]:
    """Return what of a layer can be corrected, with the sign, and the layers in order of execution.

    A layer that is called several times, or whose BatchNorm reads others too, has no one error and is left out.
    """
    outputs: dict[int, QuantizedLayer] = {}
    kept: list[Any] = []  # so that no object takes the place of another
    calls: list[QuantizedLayer] = []
    readers: dict[QuantizedLayer, list[nn.Module]] = {}
    of_norm: dict[nn.Module, int] = {}

    def made(layer: Any, args: Any, output: Any) -> None:
        calls.append(layer)
        kept.append(output)
        outputs[id(output)] = layer

    def reads(norm: nn.Module, args: Any) -> None:
        of_norm[norm] = of_norm.get(norm, 0) + 1
        if args and id(args[0]) in outputs:
            readers.setdefault(outputs[id(args[0])], []).append(norm)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(_hook(layer.register_forward_hook, made))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                hooks.enter_context(_hook(module.register_forward_pre_hook, reads))
        run_batch(model, batch, forward)
    places: dict[QuantizedLayer, tuple[Tensor, int]] = {}
    for layer in dict.fromkeys(calls):
        norms = readers.get(layer, [])
        if calls.count(layer) > 1:
            continue
        if isinstance(layer.bias, Tensor):
            places[layer] = layer.bias, 1
        elif len(norms) == 1 and of_norm[norms[0]] == 1:
            mean: Any = norms[0].running_mean
            places[layer] = mean, -1
    return places, list(dict.fromkeys(calls))


def _moments(
    model: nn.Module, layers: Sequence[QuantizedLayer], batches: Sequence[Any], forward: Forward | None
) -> dict[QuantizedLayer, tuple[Tensor, Tensor]]:
    """Return mean and standard deviation of the outputs of layers, by channel, float64."""
    sums: dict[QuantizedLayer, list[Any]] = {layer: [0.0, 0.0, 0] for layer in layers}

    def add(layer: Any, args: Any, output: Tensor) -> None:
        axis = -1 if layer.weight.dim() == 2 else output.dim() - layer.weight.dim() + 1
        rows = output.detach().movedim(axis, 0).flatten(1).double()
        total = sums[layer]
        total[0], total[1] = total[0] + rows.sum(1), total[1] + rows.square().sum(1)
        total[2] += rows.shape[1]

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(_hook(layer.register_forward_hook, add))
        for batch in batches:
            run_batch(model, batch, forward)
    found = {}
    for layer, (first, second, count) in sums.items():
        if count:
            mean = first / count
            found[layer] = mean, (second / count - mean.square()).clamp(min=0).sqrt()
    return found


@contextmanager
def _hook(register: Callable[..., Any], hook: Callable[..., None]) -> Any:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()
