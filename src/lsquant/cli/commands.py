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
from lsquant._util.entry import shown
from lsquant._util.errors import MissingFile, UsageError
from lsquant._util.files import require_no_link, write_json
from lsquant._version import __version__
from lsquant.cli import user_model
from lsquant.cli.outcome import Outcome
from lsquant.cli.subject import Subject, given, run_of, subject_of
from lsquant.cli.training import recipe_of
from lsquant.cli.words import counted, listed, measured, table
from lsquant.convert import prepare
from lsquant.diagnostics import check
from lsquant.diagnostics.environment import environment
from lsquant.formats import FileFormat, file_format, file_formats, profile_of
from lsquant.nn import quantized_layers
from lsquant.report.figure import draw_figures
from lsquant.runs import is_run, load_float
from lsquant.runs.network_files import loader_of
from lsquant.runs.settings import MOST_THREADS
from lsquant.tasks import get_task
from lsquant.training.progress import message
from lsquant.tying import weight_quantizers
from lsquant.verification import LEVELS, Verdict, export_vectors, verify
from lsquant.verification.profiles import COMPARED, Basis, compare_files
from lsquant.verification.vectors import CHECKER

Command = Callable[[Namespace], Outcome]
COMPARED_BATCHES = 8  # on which compare finds verdicts, unless --max-batches says otherwise
MANY_STEPS = 1000  # weight steps that take so long by least squared error that the user is told


def set_threads(a: Namespace) -> None:
    """Set torch's threads as --threads says."""
    if a.threads is not None:
        if not 1 <= a.threads <= MOST_THREADS:
            raise UsageError(f"--threads {shown(a.threads)}: 1 to {MOST_THREADS}")
        torch.set_num_threads(a.threads)


# ---- eval and calibrate ----


def evaluate(a: Namespace) -> Outcome:
    """Measure a run's trained model, or by the task of --task a float checkpoint, a saved or a packed file."""
    if a.task is None or is_run(a.path):
        run = run_of(a, "--task TASK")
        if a.model is not None or (a.task is not None and ":" not in a.task):
            raise UsageError(f"{a.path} is a run and brings its own model: leave out --task and --model")
        task, model = run.task, run.network()
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
    row = file_format(a.profile or subject.profile)
    model = subject.model()
    path = Path(a.out) if a.out else subject.exported(row)
    if not a.out:
        require_no_link(path)
        path.parent.mkdir(exist_ok=True)
    example = subject.example_input
    options = given(a, "opset", "form", "type", "tokenizer")
    for name in options:
        if name not in row.options:
            takers = ", ".join(other.name for other in file_formats().values() if name in other.options)
            raise UsageError(f"--{name} is an option of the profiles {takers}: leave it out with --profile {row.name}")
    if row.is_folder:  # as a file, it replaces the one before
        options["overwrite"] = True
    row.write(model, path, example, **options)
    result: dict[str, Any] = {"file": str(path), "profile": row.name, "bytes": row.size(path)}
    text = f"{path}: {result['bytes']:,} bytes"
    header = row.header_size(path)
    if header is not None:
        result["header"] = header
        text += f", {header:,} of them header"
    if a.vectors:
        result["vectors"] = str(export_vectors(model, a.vectors, subject.few_samples()))
        text += f"\n{a.vectors}; on the device: python {CHECKER} FILE.onnx {Path(a.vectors).name}"
    return Outcome(result, text)


def verify_(a: Namespace) -> Outcome:
    """Compare an exported file with the model; the verdict is kept beside a file in its usual place."""
    subject = subject_of(a)
    row = file_format(a.profile or subject.profile)
    model = subject.model()
    path = Path(a.file) if a.file else subject.exported(row)
    _check_verifiable(a, subject, path, row)
    kind = "" if a.runtime in (None, *row.runtimes[:1]) else f".{a.runtime}"
    stem = path.name if row.is_folder else path.stem
    kept = None if a.file else path.with_name(f"{stem}{kind}.verdict.json")
    if kept is not None:
        require_no_link(kept)
    batches = subject.test_batches()
    where = {"runtime": a.runtime, "node_modules": a.node_modules}
    verdict = verify(model, path, batches, max_batches=a.max_batches, **where)
    result = {"required": a.require, **verdict.to_dict(), "text": str(verdict)}
    if kept is not None:
        write_json(kept, result)
    if verdict.reaches(a.require):
        return Outcome(result, str(verdict))
    return Outcome(result, f"{verdict}\nrequired: {a.require}{_promised(verdict)}", good=False)


def _check_verifiable(a: Namespace, subject: Subject, path: Path, row: FileFormat) -> None:
    """Raise MissingFile; UsageError for options that do not fit the file."""
    if not (path.is_file() or (path / "config.json").is_file()):
        how = f"lsquant export {a.path} --profile {row.name}{subject.more_options}"
        raise MissingFile(f"{path} does not exist: {how} writes it")
    if a.profile and a.runtime is not None and a.runtime not in row.runtimes:
        raise UsageError(f"--runtime {a.runtime} does not run files of profile {row.name}: leave it out")
    if a.file and a.profile and (found := profile_of(path)) != a.profile:
        raise UsageError(f"{path} has the profile {found}, not {a.profile}: --file needs no --profile")


def _promised(verdict: Verdict) -> str:
    """Return what the format of a file promises, where the file keeps that."""
    promise = file_format(verdict.profile).promise
    if not verdict.reaches(promise) or promise == LEVELS[-1]:
        return ""
    return f" (profile {verdict.profile} promises {promise}: --require {promise})"


def compare_(a: Namespace) -> Outcome:
    """Write every file that a run or FILE can ship as and compare them; the result is kept in a run's folder."""
    subject = subject_of(a)
    model = subject.compared()
    limit = COMPARED_BATCHES if a.max_batches is None else a.max_batches
    threads, repeats = 1 if a.threads is None else a.threads, 15 if a.repeats is None else a.repeats
    kept = subject.comparison_file()
    if kept is not None:
        require_no_link(kept)
        kept.parent.mkdir(exist_ok=True)
    batches = list(take(subject.test_batches(), limit))
    basis = Basis(subject.timed_batch(), batches, None, subject.metrics, subject.float_metrics())
    message(f"writing, verifying and timing files: {', '.join(COMPARED)}", a.quiet)
    found = compare_files(model, basis, folder=a.out, threads=threads, repeats=repeats)
    result = {**found.to_dict(), "text": str(found)}
    if kept is not None:
        write_json(kept, result)
    return Outcome(result, str(found))


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
