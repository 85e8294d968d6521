"""What runs in PyTorch beside the trained model: the integer model, and a packed file reloaded into a copy."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lsquant import nn as lsq_nn
from lsquant._util.batches import Forward, evaluating, run_batch, take
from lsquant._util.errors import UsageError
from lsquant.convert import revert
from lsquant.export.graph import array
from lsquant.export.packed import load_packed, read_packed
from lsquant.integer import FrozenQuantizer, frozen_parts
from lsquant.kernels import engine_for
from lsquant.verification.recorder import Call, input_codes, layer_input, recording, samples, watched
from lsquant.verification.verdict import Check, Tally, Verdict

Modules = dict[str, nn.Module]


def verify_packed(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Any],
    forward: Forward | None,
    max_batches: int | None,
) -> Verdict:
    """As ``verify``, for a file of ``export_packed``.  Raises: as ``load_packed``."""
    twin = load_packed(revert(copy.deepcopy(model)), path)
    weights = compare_weights(model, read_packed(path).quantizers)
    return verify_twin(model, twin, weights, (os.fspath(path), "packed", "reloaded"), batches, forward, max_batches)


def verify_integer(
    model: nn.Module, twin: nn.Module, batches: Iterable[Any], forward: Forward | None, max_batches: int | None
) -> Verdict:
    """As ``verify``, for the integer model.  Raises: UsageError where it is of another model, or none."""
    parts = frozen_parts(twin)
    if odd := sorted(set(parts) ^ set(watched(model))):
        raise UsageError(f"verify: {type(twin).__name__} is not this model's integer model: {odd[0]!r} is only in one")
    weights = compare_weights(model, {n: m for n, m in twin.named_modules() if isinstance(m, FrozenQuantizer)})
    device = next(iter(twin.state_dict().values())).device.type
    said = (type(twin).__name__, "integer", f"engine {engine_for(device).name}")
    return verify_twin(model, twin, weights, said, batches, forward, max_batches)


def verify_twin(
    model: nn.Module,
    twin: nn.Module,
    weights: Check,
    said: tuple[str, str, str],
    batches: Iterable[Any],
    forward: Forward | None,
    max_batches: int | None,
) -> Verdict:
    """Both on the same batches.  said: what is compared, its profile, how it runs."""
    tallies = [
        Tally("layers", "input codes, layer by layer"),
        Tally("layers", "outputs, layer by layer"),
        Tally("codes", "input codes, end to end"),
        Tally("outputs", "outputs"),
    ]
    mine, theirs = watched(model), watched(twin)
    count = total = 0
    with evaluating(model), evaluating(twin):
        for batch in take(batches, max_batches):
            with recording(twin) as got:
                run_batch(twin, batch, forward)
            with recording(model) as want, _layer_by_layer(mine, theirs, *tallies[:2]):
                run_batch(model, batch, forward)
            if not want:
                raise UsageError("verify: forward(model, batch) did not call the model")
            for one, other in zip(got, want, strict=True):
                for (name, number), (x, _) in other.layers.items():
                    _add(tallies[2], name, _codes(theirs, one, name, number), _of(mine[name], x))
                for i, (y, expected) in enumerate(zip(one.outputs, other.outputs, strict=True)):
                    _add(tallies[3], f"output {i}", y, expected)
            count, total = count + 1, total + samples(want)
    path, profile, how = said
    checks = (weights, *(tally.check() for tally in tallies))
    return Verdict(path, profile, f"PyTorch {torch.__version__}, {how}", {}, len(mine), count, total, checks)


@contextmanager
def _layer_by_layer(mine: Modules, theirs: Modules, codes: Tally, outputs: Tally) -> Iterator[None]:
    """While the block runs every layer's twin is given what the layer is given."""

    def hook(name: str) -> Any:
        def compare(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            x = (*args, *kwargs.values())[0]
            _add(codes, name, _of(theirs[name], x), _of(layer, x))
            _add(outputs, name, theirs[name](*args, **kwargs), output)

        return compare

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in mine.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of(layer: nn.Module, x: Tensor) -> Tensor | None:
    return input_codes(layer, layer_input(layer, x))


def _codes(layers: Modules, call: Call, name: str, number: int) -> Tensor | None:
    return _of(layers[name], call.layers[name, number][0]) if (name, number) in call.layers else None


def _add(tally: Tally, name: str, got: Tensor | None, want: Tensor | None) -> None:
    if want is not None:
        tally.add(name, np.zeros(0) if got is None else _array(got), _array(want))


def _array(t: Tensor) -> np.ndarray:
    """NumPy has no bfloat16: its values are compared as float32."""
    return array(t.float() if t.dtype == torch.bfloat16 else t)


def compare_weights(model: nn.Module, stored: Mapping[str, Any]) -> Check:
    """The level ``weights``: codes, steps and zero points against the trained ones.  stored: by quantizer's name."""
    tally = Tally("weights", "weight codes, steps and zero points")
    names = {quantizer: name for name, quantizer in lsq_nn.quantizers(model)}
    for quantizer, name in names.items():
        found = stored.get(name)
        _add(tally, name, found and found.step, quantizer.effective_step())
        _add(tally, name, found and found.zero_point, quantizer.zero_point())
    for _, layer in lsq_nn.quantized_layers(model):
        if layer.weight_quantizer is not None:
            found, codes = stored.get(names[layer.weight_quantizer]), layer.integer_weight()[0]
            want = layer.to_rows(codes) if isinstance(found, FrozenQuantizer) else codes
            _add(tally, names[layer.weight_quantizer], found and found.codes, want)
    return tally.check()
