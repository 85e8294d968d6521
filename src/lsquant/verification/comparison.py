"""``verify``: a file, or the integer model, against the trained model, level by level.

One loop serves every format and runtime: the format yields what the file holds of codes and steps, the runtime what it
computes for each call of the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lsquant._util.batches import Forward, evaluating, run_batch, take, unwrapped
from lsquant._util.errors import LsquantError, UsageError
from lsquant.formats import FileFormat, file_format, format_of
from lsquant.formats.onnx.graph import array
from lsquant.shipped import FrozenQuantizer, Pair, Stored, frozen_parts, paired, ship
from lsquant.verification.recorder import Call, input_codes, layer_input, recording, samples, watched
from lsquant.verification.runtimes import RUNTIMES, Observed, Opened
from lsquant.verification.runtimes.pytorch import engine_of, opened_model
from lsquant.verification.verdict import Check, Differences, Verdict

OTHER_FORM = (
    "compared with the fused form of the model, lsquant.fuse(model), from which the model's own outputs differ a "
    "little where it was not trained in that form"
)


def verify(
    model: nn.Module,
    path: str | os.PathLike[str] | nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    runtime: str | None = None,
    node_modules: str | os.PathLike[str] | None = None,
) -> Verdict:
    """Compare a file, or the integer model, with the trained model it was made from, on data.

    Levels: ``weights``, the file's codes and steps are the trained ones; ``layers``, every layer fed the trained
    model's own input gives its codes and outputs; ``codes``, all codes are equal end to end; ``outputs``, the
    unmodified file gives bit-equal outputs.  Each with the recommended options (ONNX Runtime: those in the file;
    OpenVINO: float32 and accuracy before speed), and without any.

    model: the trained model; it is run in eval mode and left as it was.
    path: an ONNX file; a packed file, reloaded and run in PyTorch, where its codes are the weights; a model folder of
        transformers, which is compared and not run; or what ``to_integer`` returned.
    batches: as for ``calibrate``; all of them unless max_batches says less.
    forward: ``forward(model, batch)`` where a batch is not simply the model's input.
    max_batches: the number of batches to look at.
    runtime: what runs the file; default: the first that its format names.  ONNX files: "onnxruntime", "openvino" or
        "onnxruntime-web", which runs in a headless Chromium.
    node_modules: the folder with onnxruntime-web; default: the environment variable LSQUANT_NODE_MODULES.

    Raises: MissingFile, DamagedFile, MissingExtra; UsageError where the file is of another model.
    """
    model = unwrapped(model)
    if isinstance(path, nn.Module):
        return _verify_model(model, path, batches, forward, max_batches)
    row = format_of(path)
    content = row.read(path)
    row = file_format(row.profile(content))
    name = _runtime(row, path, runtime)
    file, trained, model = os.fspath(path), model, row.counterpart(model)
    weights = compare_weights(file, row.pairs(content, model))
    if name is None:
        return Verdict(file, row.name, "no runtime: codes and steps only", {}, len(watched(model)), 0, 0, (weights,))
    with RUNTIMES[name].open(file, content, model, node_modules) as opened:
        verdict = compare(model, opened, (file, row.name), weights, batches, forward, max_batches)
    return verdict if model is trained else replace(verdict, remarks=(*verdict.remarks, OTHER_FORM))


def _runtime(row: FileFormat, path: Any, wanted: str | None) -> str | None:
    """Return the name of the runtime, None for a format that is not run.  Raises: UsageError for another runtime."""
    if wanted is None:
        return next(iter(row.runtimes), None)
    if wanted not in RUNTIMES:
        raise UsageError(f"verify: runtime={wanted!r} is unknown; choose from {', '.join(RUNTIMES)}")
    if wanted not in row.runtimes:
        where = f"which runs in {', '.join(row.runtimes)}" if row.runtimes else "which no runtime runs"
        raise UsageError(f"verify: {path} is a file of format {row.name}, {where}: leave out runtime={wanted!r}")
    return wanted


def _verify_model(
    model: nn.Module, twin: nn.Module, batches: Iterable[Any], forward: Forward | None, max_batches: int | None
) -> Verdict:
    """Compare the integer model.  Raises: UsageError where it is of another model, or none."""
    kind = type(twin).__name__
    if odd := sorted(set(frozen_parts(twin)) ^ set(watched(model))):
        raise UsageError(f"verify: {kind} is not this model's integer model: {odd[0]!r} is only in one")
    frozen = {name: m for name, m in twin.named_modules() if isinstance(m, FrozenQuantizer)}
    stored = {name: Stored(q.step, q.zero_point, q.codes) for name, q in frozen.items()}
    weights = compare_weights(kind, paired(ship(model), stored))
    with opened_model(twin, engine_of(twin)) as opened:
        return compare(model, opened, (kind, "integer"), weights, batches, forward, max_batches)


def compare_weights(file: str, pairs: Iterable[Pair]) -> Check:
    """Return the level ``weights``: what the file holds against the trained codes and steps, bit by bit.

    Raises: UsageError for a file that holds nothing to compare.
    """
    found = Differences("weights", "weight codes and steps")
    nothing = np.zeros(0)
    for name, stored, shipped in pairs:
        found.add(
            name, nothing if stored is None else comparable(stored), nothing if shipped is None else comparable(shipped)
        )
    if not found.parts:
        raise UsageError(f"{file} holds no codes and no steps to compare")
    return found.check()


def compare(
    model: nn.Module,
    opened: Opened,
    subject: tuple[str, str],
    weights: Check,
    batches: Iterable[Any],
    forward: Forward | None,
    max_batches: int | None,
) -> Verdict:
    """Return the verdict on what is open in a runtime: the loop over batches, for all formats and runtimes.

    subject: the file and its profile, for the verdict.
    weights: the check of the level ``weights``.
    """
    file, profile = subject
    counted = [_Levels(file) for _ in opened.runners]
    batch_count = sample_count = 0
    with evaluating(model), recording(model) as calls:
        modules = watched(model)
        for batch in take(batches, max_batches):
            calls.clear()
            run_batch(model, batch, forward)
            if not calls:
                raise UsageError("verify: forward(model, batch) did not call the model")
            codes = [_codes(modules, call) for call in calls]
            for levels, (_, runner) in zip(counted, opened.runners, strict=True):
                observed = runner.run(calls, batch, forward)
                for call, expected, found in zip(calls, codes, observed, strict=True):
                    levels.add(call, expected, found)
            batch_count, sample_count = batch_count + 1, sample_count + samples(calls)
    verdicts = [
        Verdict(
            path=file,
            profile=profile,
            runtime=opened.title,
            session=options,
            layers=len(modules),
            batches=batch_count,
            samples=sample_count,
            checks=(weights, *levels.checks()),
            not_compared=tuple(name for name in modules if name not in levels.layer_outputs.parts),
            remarks=(*levels.remarks(), *opened.remarks),
        )
        for levels, (options, _) in zip(counted, opened.runners, strict=True)
    ]
    return replace(verdicts[0], plain=verdicts[-1]) if opened.has_options else verdicts[0]


class _Levels:
    """The differences at the levels layers, codes and outputs, over all batches."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.layer_codes = Differences("layers", "input codes, layer by layer")
        self.layer_outputs = Differences("layers", "outputs, layer by layer")
        self.codes = Differences("codes", "input codes, end to end")
        self.outputs = Differences("outputs", "outputs")
        self.first = self.returned = ""

    def checks(self) -> tuple[Check, ...]:
        return tuple(d.check() for d in (self.layer_codes, self.layer_outputs, self.codes, self.outputs))

    def add(self, call: Call, expected: dict[Any, np.ndarray | None], observed: Observed) -> None:
        """Compare one call of the model.  expected: the trained codes of each layer call, None where there are none."""
        compared = set()
        for key, codes, y in observed.layers:
            compared.add(key)
            _add_codes(self.layer_codes, key[0], codes, expected[key])
            self.layer_outputs.add(key[0], comparable(y), comparable(call.layers[key].output))
        for key, codes in observed.codes:
            _add_codes(self.codes, key[0], codes, expected[key])
        if len(observed.outputs) != len(call.outputs):
            raise UsageError(f"{self.file} has {len(observed.outputs)} outputs, the model {len(call.outputs)}")
        for (name, y), want in zip(observed.outputs, call.outputs, strict=True):
            self.outputs.add(name, comparable(y), comparable(want))
        for key in call.layers.keys() - compared if self.outputs.found else ():  # it is no part that was of no use
            self.layer_outputs.add(key[0], np.zeros(0), comparable(call.layers[key].output))
        self.returned = call.returned
        if not self.first and (self.codes.found or self.outputs.found):
            try:
                self.first = observed.explain()
            except LsquantError as error:  # the counts stand by themselves
                self.first = f"what differs first was not found: {error}"

    def remarks(self) -> tuple[str, ...]:
        """Return what differs first, and which comparison had nothing to compare."""
        nothing = []
        if not self.outputs.check().compared and self.outputs.parts:
            nothing = ["nothing was compared: the batches hold no samples"]
        elif not self.outputs.parts:
            nothing = [f"no outputs were compared: no tensor is found in what the model returns, a {self.returned}"]
        return (*nothing, *([self.first] if self.first else []))


def _codes(modules: dict[str, nn.Module], call: Call) -> dict[Any, np.ndarray | None]:
    """Return the trained codes of the input of each layer call; NaN, which equals no code, stays NaN."""
    found = {}
    for key, recorded in call.layers.items():
        layer = modules[key[0]]
        codes = input_codes(layer, layer_input(layer, recorded.input))
        found[key] = None if codes is None else comparable_codes(codes)
    return found


def _add_codes(differences: Differences, name: str, got: Tensor | np.ndarray | None, want: np.ndarray | None) -> None:
    """Count codes; those that a file lacks are mismatches, those that the model lacks are left out."""
    if want is not None:
        differences.add(name, np.zeros(0) if got is None else comparable_codes(got), want)


def comparable_codes(codes: Tensor | np.ndarray) -> np.ndarray:
    """Return codes as an array without -0.0, which rounding makes of small negative values and no integer has."""
    return comparable(codes) + np.float32(0)


def comparable(value: Tensor | np.ndarray) -> np.ndarray:
    """Return an array; bfloat16, which NumPy lacks, as float32."""
    if isinstance(value, np.ndarray):
        return value
    return array(value.float() if value.dtype == torch.bfloat16 else value)
