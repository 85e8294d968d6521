"""The other commands: each parses its arguments, calls the library and returns an Outcome."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lsquant import calibration, checkpoint
from lsquant._util.batches import take
from lsquant._util.errors import MissingFile, UsageError
from lsquant._util.files import write_json
from lsquant._util.tensors import header_size
from lsquant._version import __version__
from lsquant.cli import user_model
from lsquant.cli.outcome import Outcome
from lsquant.cli.subject import Subject, given, run_of, subject_of
from lsquant.cli.training import recipe_of
from lsquant.cli.words import counted, listed, measured, table
from lsquant.convert import prepare
from lsquant.diagnostics import check
from lsquant.diagnostics.environment import environment
from lsquant.export import export_onnx, export_packed
from lsquant.export.packed import PROFILE as PACKED
from lsquant.nn import quantized_layers
from lsquant.report.figure import draw_figures
from lsquant.runs import is_run, load_float
from lsquant.runs.network_files import loader_of
from lsquant.tasks import get_task
from lsquant.training.progress import message
from lsquant.tying import weight_quantizers
from lsquant.verification import RUNTIMES, export_vectors, verify
from lsquant.verification.judge import profile_of
from lsquant.verification.vectors import CHECKER

Command = Callable[[Namespace], Outcome]
DEFAULT_PROFILE = "exact"
MANY_STEPS = 1000  # weight steps that take so long by least squared error that the user is told


def set_threads(a: Namespace) -> None:
    """Set torch's threads as --threads says."""
    if a.threads is not None:
        if a.threads < 1:
            raise UsageError(f"--threads {a.threads}: at least 1")
        torch.set_num_threads(a.threads)


# ---- eval and calibrate ----


def evaluate(a: Namespace) -> Outcome:
    """Measure a run's trained model, or by the task of --task a float checkpoint, a saved or a packed file."""
    if a.task is None or is_run(a.path):
        run = run_of(a, "--task TASK")
        if a.task is not None or a.model is not None:
            raise UsageError(f"{a.path} is a run and brings its own model: leave out --task and --model")
        task, model = run.task, run.model()
    else:
        task = get_task(a.task, **given(a, "data", "model"))
        model = loader_of(a.path)(task.model(), a.path)
    metrics = task.metric(model)
    return Outcome(metrics, measured(metrics))


def calibrate(a: Namespace) -> Outcome:
    """Prepare and calibrate the user's model without training, and write the file of ``lsquant.save``."""
    recipe = recipe_of(a)
    path = Path(a.out)
    if path.exists() and not a.overwrite:
        raise UsageError(f"{path} exists: --overwrite replaces it")
    model = user_model.build(a.model, a.seed)
    if a.init is not None:
        load_float(model, a.init)
    changes = prepare(model, recipe, next(iter(take(user_model.batches(a.data), 1))))
    limit = 32 if a.max_batches is None else a.max_batches
    weight_rule, activation_rule = a.weight_init or "mse", a.activation_init or "mse"
    message(f"calibrating on at most {limit} batches of {a.data}", a.quiet)
    count = sum(quantizer.step.numel() for quantizer in weight_quantizers(model))
    if weight_rule == "mse" and count > MANY_STEPS:
        about = "--weight-init paper is instant, and poor at 8 bits without training"
        message(f"{count:,} weight steps by least squared error, about 10 ms each; {about}", a.quiet)
    data = user_model.batches(a.data)
    calibration.calibrate(model, data, max_batches=limit, method=activation_rule, weights=weight_rule)
    sources = {name: layer.input_quantizer for name, layer in quantized_layers(model)}
    decided = {name: str(source.spec) for name, source in sources.items() if source is not None}  # signs too
    changes = type(changes)(replace(c, activation=decided.get(c.name, c.activation)) for c in changes)
    checkpoint.save(model.eval(), path)
    size = path.stat().st_size
    result = {
        "file": str(path),
        "bytes": size,
        "weight_share": changes.weight_share,
        "layers": [asdict(change) for change in changes],
    }
    return Outcome(result, f"{changes}\n{path}: {size:,} bytes")


# ---- export and verify ----


def export(a: Namespace) -> Outcome:
    """Write the integers of a run or FILE in a profile's format, where --out says or in the usual place."""
    subject = subject_of(a)
    profile = a.profile or DEFAULT_PROFILE
    model = subject.model()
    path = Path(a.out) if a.out else subject.exported(profile)
    if not a.out:
        path.parent.mkdir(exist_ok=True)
    example = subject.example_input
    if profile == PACKED and a.opset is not None:
        raise UsageError("--opset belongs to ONNX files: leave it out with --profile packed")
    if profile == PACKED:
        export_packed(model, path)
    else:
        export_onnx(model, path, example, profile=profile, opset=a.opset)
    result: dict[str, Any] = {"file": str(path), "profile": profile, "bytes": path.stat().st_size}
    text = f"{path}: {result['bytes']:,} bytes"
    if profile == PACKED:
        result["header"] = header_size(path)
        text += f", {result['header']:,} of them header"
    if a.vectors:
        result["vectors"] = str(export_vectors(model, a.vectors, subject.few_samples()))
        text += f"\n{a.vectors}; on the device: python {CHECKER} FILE.onnx {Path(a.vectors).name}"
    return Outcome(result, text)


def verify_(a: Namespace) -> Outcome:
    """Compare an exported file with the model; the verdict is kept beside a file in its usual place."""
    subject = subject_of(a)
    profile = a.profile or DEFAULT_PROFILE
    model = subject.model()
    path = Path(a.file) if a.file else subject.exported(profile)
    _check_verifiable(a, subject, path, profile)
    batches = subject.test_batches()
    where = {"runtime": a.runtime, "node_modules": a.node_modules}
    verdict = verify(model, path, batches, max_batches=a.max_batches, **where)
    result = {"required": a.require, **verdict.to_dict(), "text": str(verdict)}
    if not a.file:
        kind = "" if a.runtime == RUNTIMES[0] else f".{a.runtime}"
        write_json(path.with_suffix(f"{kind}.verdict.json"), result)
    if verdict.reaches(a.require):
        return Outcome(result, str(verdict))
    hint = " (profile qdq promises weights: --require weights)" if verdict.profile == "qdq" else ""
    return Outcome(result, f"{verdict}\nrequired: {a.require}{hint}", good=False)


def _check_verifiable(a: Namespace, subject: Subject, path: Path, profile: str) -> None:
    """Raises: MissingFile; UsageError for options that do not fit the file."""
    if not path.is_file():
        how = f"lsquant export {a.path} --profile {profile}{subject.more_options}"
        raise MissingFile(f"{path} does not exist: {how} writes it")
    if a.profile == PACKED and a.runtime != RUNTIMES[0]:
        raise UsageError(f"--runtime {a.runtime} is for ONNX files: leave it out with --profile packed")
    if a.file and a.profile and (found := profile_of(path)) != a.profile:
        raise UsageError(f"{path} has the profile {found}, not {a.profile}: --file needs no --profile")


# ---- check, figure, env ----


def check_(a: Namespace) -> Outcome:
    """Find what is wrong with a trained model; not good when a finding is an error."""
    subject = subject_of(a)
    limit = 8 if a.max_batches is None else a.max_batches
    found = check(subject.model(), batches=subject.check_batches(), max_batches=limit)
    numbers = counted(found)
    return Outcome({"findings": [asdict(f) for f in found], **numbers}, listed(found), good=not numbers["errors"])


def figure(a: Namespace) -> Outcome:
    """Draw staircase.svg and staircase.png in a folder."""
    paths = [str(p) for p in draw_figures(a.out, bits=a.bits, signed=a.signed, offset=a.offset)]
    return Outcome({"files": paths}, "\n".join(paths))


def env(a: Namespace) -> Outcome:
    """Print versions and hardware."""
    facts = {"lsquant": __version__, **environment()}
    rows = [(key, value) for key, value in facts.items() if key not in ("engines", "packages")]
    rows += [(f"engine {name}", state) for name, state in facts["engines"].items()]
    rows += list(facts["packages"].items())
    return Outcome(facts, table([(k, ", ".join(v) if isinstance(v, list) else str(v)) for k, v in rows]))
