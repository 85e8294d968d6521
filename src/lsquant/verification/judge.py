"""``verify``: the file against the trained model, level by level."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lsquant import nn as lsq_nn
from lsquant._util.batches import Forward, evaluating, run_batch, take
from lsquant._util.errors import DamagedFile, UsageError
from lsquant.export.graph import Facts, array
from lsquant.export.onnx import initializers, load_onnx
from lsquant.export.packed import PROFILE as PACKED
from lsquant.quantizer import Quantizer
from lsquant.verification.onnx_runner import OnnxRunner
from lsquant.verification.packed_runner import verify_integer, verify_packed
from lsquant.verification.recorder import Call, input_codes, layer_input, recording, samples, watched
from lsquant.verification.runtimes import RUNTIMES, running
from lsquant.verification.verdict import Tally, Verdict


def verify(
    model: nn.Module,
    path: str | os.PathLike[str] | nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    runtime: str = RUNTIMES[0],
    node_modules: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Compare a file, or the integer model, with the trained model it was made from, on data.

    path: an ONNX file, run in ONNX Runtime; a packed file, reloaded and run in PyTorch, where its codes are the
    weights; or what ``to_integer`` returned.

    model: the trained model; it is run in eval mode and left as it was.  batches: as for ``calibrate``; all of them
    unless max_batches says less.  forward: ``forward(model, batch)`` where a batch is not simply the model's input.
    runtime: for ONNX files, "onnxruntime", "openvino" or "onnxruntime-web", which runs in a headless Chromium.
    node_modules: the folder with onnxruntime-web; default: the environment variable LSQUANT_NODE_MODULES.

    Levels: ``weights``, the file's codes and steps are the trained ones; ``layers``, every layer fed the trained
    model's own input gives its codes and outputs; ``codes``, all codes are equal end to end; ``outputs``, the
    unmodified file gives bit-equal outputs.  Each with the recommended options (ONNX Runtime: those in the file;
    OpenVINO: float32 and accuracy before speed), and without any.

    Raises: MissingFile, DamagedFile, MissingExtra; UsageError where the file is of another model.
    """
    if isinstance(path, nn.Module):
        return verify_integer(model, path, batches, forward, max_batches)
    if runtime not in RUNTIMES:
        raise UsageError(f"verify: runtime={runtime!r} is unknown; choose from {', '.join(RUNTIMES)}")
    if _is_safetensors(path):
        if runtime != RUNTIMES[0]:
            raise UsageError(f"verify: {path} is a packed file, which runs in PyTorch: leave out runtime={runtime!r}")
        return verify_packed(model, path, batches, forward, max_batches)
    proto, metadata = load_onnx(path)
    facts: list[Facts] = metadata["layers"]
    modules = watched(model)
    if {fact.layer for fact in facts} != set(modules):
        odd = sorted({fact.layer for fact in facts} ^ set(modules))
        raise UsageError(f"{path} is of another model: the layer {odd[0]!r} is only in one of the two")
    file, counts = os.fspath(path), {"batches": 0, "samples": 0}
    with running(runtime, metadata["session"], node_modules) as target:
        sessions = {
            kind: _Session(OnnxRunner(target, file, proto, facts, options), facts, modules)
            for kind, options in target.kinds.items()
        }
        with evaluating(model), recording(model) as calls:
            weights = compare_weights(model, proto, facts)
            for batch in take(batches, max_batches):
                calls.clear()
                run_batch(model, batch, forward)
                if not calls:
                    raise UsageError("verify: forward(model, batch) did not call the model")
                for call in list(calls):
                    for session in sessions.values():
                        session.compare(call, file)
                counts["batches"] += 1
                counts["samples"] += samples(calls)
    common = {"path": file, "profile": metadata["profile"], "layers": len(modules), **counts}
    verdicts = [
        Verdict(runtime=target.title, session=target.kinds[kind], checks=(weights, *session.checks()), **common)
        for kind, session in sessions.items()
    ]
    return replace(verdicts[0], plain=verdicts[-1])


def profile_of(path: str | os.PathLike[str]) -> str:
    """The profile of a file, packed or ONNX, which is not run.  Raises: MissingFile, DamagedFile."""
    return PACKED if _is_safetensors(path) else load_onnx(path)[1]["profile"]


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    """By content: eight bytes of length, then JSON."""
    if not Path(path).is_file():
        return str(path).endswith(".safetensors")
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


class _Session:
    """Tallies of one session over all batches."""

    def __init__(self, runner: OnnxRunner, facts: list[Facts], modules: dict[str, nn.Module]) -> None:
        self.runner, self.facts, self.modules = runner, facts, modules
        self.tallies = [
            Tally("layers", "input codes, layer by layer"),
            Tally("layers", "outputs, layer by layer"),
            Tally("codes", "input codes, end to end"),
            Tally("outputs", "outputs of the file"),
        ]

    def checks(self) -> list[Any]:
        return [tally.check() for tally in self.tallies]

    def compare(self, call: Call, path: str) -> None:
        """Compare one call of the model at the levels layers, codes and outputs."""
        layer_codes, layer_outputs, all_codes, outputs = self.tallies
        inputs, expected = [], []
        for fact in self.facts:
            if (fact.layer, fact.call) not in call.layers:
                raise UsageError(f"{path}: the model called layer {fact.layer!r} less often than the exported one does")
            x, y = call.layers[fact.layer, fact.call]
            x = layer_input(self.modules[fact.layer], x)
            inputs.append(array(x))
            expected.append((_stored(self.modules[fact.layer], x, fact), array(y)))
        alone = self.runner.run_layers(inputs)
        for fact, (codes, y), (want_codes, want) in zip(self.facts, alone, expected, strict=True):
            if codes is not None and want_codes is not None:
                layer_codes.add(fact.layer, codes.astype(np.float32), want_codes)
            layer_outputs.add(fact.layer, y, want)
        feeds = self._feeds(call, path)
        codes = self.runner.run_codes(feeds)
        for fact, (want_codes, _) in zip(self.facts, expected, strict=True):
            if fact.codes is not None and want_codes is not None:
                all_codes.add(fact.layer, codes[fact.codes].astype(np.float32), want_codes)
        got = self.runner.run(feeds)
        if len(got) != len(call.outputs):
            raise UsageError(f"{path} has {len(got)} outputs, the model {len(call.outputs)}")
        for name, y, want in zip(self.runner.outputs, got, call.outputs, strict=True):
            outputs.add(name, y, array(want))

    def _feeds(self, call: Call, path: str) -> dict[str, np.ndarray]:
        keywords = {name.lower(): t for name, t in call.keywords.items()}  # torch's exporter writes lower case
        feeds = {name: array(keywords[name.lower()]) for name in self.runner.inputs if name.lower() in keywords}
        names = [name for name in self.runner.inputs if name not in feeds]
        if len(names) != len(call.inputs):
            given = len(call.inputs)
            raise UsageError(f"{path} takes the inputs {self.runner.inputs}; the model was given {given} tensors")
        return {**feeds, **dict(zip(names, map(array, call.inputs), strict=True))}


def _stored(layer: nn.Module, x: Tensor, fact: Facts) -> np.ndarray | None:
    """The trained model's codes as the file stores them, float32 integers; NaN, which no code equals, stays NaN."""
    codes = input_codes(layer, x)
    return None if codes is None else array(codes) + np.float32(fact.offset)


# ---- weights ----


def compare_weights(model: nn.Module, proto: Any, facts: list[Facts]) -> Any:
    """The level ``weights``: codes, steps and products of steps in the file against the trained ones, bit by bit."""
    tally = Tally("weights", "weight codes and steps")
    values = initializers(proto)
    modules: dict[str, Any] = watched(model)
    for fact in facts:
        named = [*fact.weights, *fact.scales, *fact.weight_steps, *([fact.input_step] if fact.input_step else [])]
        if missing := [name for name in named if name not in values]:
            raise DamagedFile(f"the file has no initializer {missing[0]!r}, which its layer {fact.layer!r} names")
        layer = modules[fact.layer]
        quantizer = layer if isinstance(layer, Quantizer) else layer.input_quantizer
        step_x = None if quantizer is None else array(quantizer.effective_step())
        if step_x is not None and fact.input_step:
            tally.add(fact.layer, values[fact.input_step].reshape(-1), step_x)
        if isinstance(layer, lsq_nn.QuantizedLayer) and layer.weight_quantizer is not None:
            _compare_weight(tally, layer, fact, values, step_x)
    return tally.check()


def _compare_weight(tally: Tally, layer: Any, fact: Facts, values: dict[str, np.ndarray], step_x: Any) -> None:
    weight, step = layer.integer_weight()[0], array(layer.integer_weight()[1])
    codes = array(weight if fact.layout == "own" else layer.to_rows(weight)).astype(np.int32)
    parts = [values[name].astype(np.int32) for name in fact.weights]
    parts = [part.T for part in parts] if fact.transposed else parts
    stored = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    if stored.size == codes.size and not fact.transposed:
        stored = stored.reshape(codes.shape)
    if fact.layout == "reversed":
        stored = np.flip(stored, tuple(range(2, stored.ndim)))
    tally.add(fact.layer, stored - fact.weight_offset, codes)
    if fact.weight_steps:
        tally.add(fact.layer, values[fact.weight_steps[0]].reshape(-1), step)
    if fact.scales:
        scales = np.stack([values[name].reshape(-1) for name in fact.scales], axis=1).reshape(-1)
        tally.add(fact.layer, scales, (step_x * step).reshape(-1))
