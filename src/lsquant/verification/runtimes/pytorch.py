"""PyTorch: a packed file loaded into a copy of the model, or the integer model, beside the trained one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.batches import Forward, evaluating, run_batch
from lsquant._util.errors import UsageError
from lsquant.convert import revert
from lsquant.formats.packed import load_packed
from lsquant.kernels import engine_for
from lsquant.shipped import copied
from lsquant.verification.recorder import Call, LayerCall, input_codes, layer_input, recording, watched
from lsquant.verification.runtimes.protocol import Observed, Opened, Runtime


class PyTorchRuntime(Runtime):
    """Loads a packed file into a copy of the trained model, on the engines that train."""

    name = "pytorch"

    @contextmanager
    def open(self, path: str, content: Any, model: nn.Module, node_modules: Any = None) -> Iterator[Opened]:
        twin = load_packed(revert(copied(model)), path)
        with opened_model(twin, "reloaded") as found:
            yield found


@contextmanager
def opened_model(twin: nn.Module, how: str) -> Iterator[Opened]:
    """Run a model beside the trained one until the block ends.  how: it runs, for the title."""
    with evaluating(twin):
        yield Opened(f"PyTorch {torch.__version__}, {how}", [({}, ModelRunner(twin))], has_options=False)


def engine_of(model: nn.Module) -> str:
    """Return the name of the engine that a model runs on."""
    device = next(iter(model.state_dict().values())).device.type
    return f"engine {engine_for(device).name}"


class ModelRunner:
    """A model with layers of the trained model's names."""

    def __init__(self, twin: nn.Module) -> None:
        self.twin, self.layers = twin, watched(twin)

    def run(self, calls: list[Call], batch: Any, forward: Forward | None) -> Iterator[Observed]:
        """Yield what the model gives for each call on the batch; layers are computed as they are asked for."""
        with recording(self.twin) as own_calls:
            run_batch(self.twin, batch, forward)
        if len(own_calls) != len(calls):
            kind = type(self.twin).__name__
            raise UsageError(f"verify: {kind} was called {len(own_calls)} times, the trained model {len(calls)} times")
        for own, call in zip(own_calls, calls, strict=True):
            outputs = [(f"output {i}", y) for i, y in enumerate(own.outputs)]
            explain = partial(_first_difference, own, call)
            yield Observed(self._alone(call), self._end_to_end(own, call), outputs, explain)

    def _alone(self, call: Call) -> Iterator[tuple[LayerCall, Tensor | None, Tensor]]:
        for key, recorded in call.layers.items():
            layer = self.layers[key[0]]
            yield key, self._input_codes(key, recorded.input), layer.forward(*recorded.args, **recorded.keywords)

    def _end_to_end(self, own: Call, call: Call) -> Iterator[tuple[LayerCall, Tensor | None]]:
        for key in call.layers:
            yield key, self._input_codes(key, own.layers[key].input) if key in own.layers else None

    def _input_codes(self, key: LayerCall, x: Tensor) -> Tensor | None:
        layer = self.layers[key[0]]
        return input_codes(layer, layer_input(layer, x))


def _first_difference(own: Call, call: Call) -> str:
    """Name what first gives another value than the trained model: a layer, or the float parts beside one."""
    before = ""
    for key, recorded in call.layers.items():
        found = own.layers.get(key)
        if found is None:
            return f"layer {key[0]!r} is not called"
        if not equal(found.input, recorded.input):
            return f"float parts that differ first: those before layer {key[0]!r}"
        if not equal(found.output, recorded.output):
            return f"layer {key[0]!r} differs first: it is given equal values"
        before = key[0]
    return f"float parts that differ first: those after layer {before!r}"


def equal(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are equal; NaN equals NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
