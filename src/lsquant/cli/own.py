"""The commands on the user's own model: a file of ``lsquant.save``, ``--model`` and ``--data``."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from lsquant import calibration, checkpoint
from lsquant._util.batches import take
from lsquant._util.errors import MissingFile, UsageError
from lsquant._util.files import read_json, write_json
from lsquant._util.nested import map_tensors
from lsquant.convert import prepare
from lsquant.diagnostics import Finding
from lsquant.diagnostics.checks import SEVERITIES
from lsquant.formats import file_format, file_formats, profile_of
from lsquant.nn import quantized_layers
from lsquant.recipe import Recipe
from lsquant.report.page import write_report
from lsquant.tasks import is_run, load_float
from lsquant.tasks.loading import call, load_object
from lsquant.training.progress import message
from lsquant.training.seeds import seed_everything
from lsquant.verification import LEVELS, Verdict, export_vectors, verify
from lsquant.verification.vectors import CHECKER

Outcome = tuple[dict[str, Any], str, bool]
VECTORS = 4  # samples of --vectors
MANY = 1000  # weight steps that take so long by least squared error that it is said
SHOWN = 3  # findings of one code that are shown in full


def is_own(a: Namespace) -> bool:
    """Whether a command is about the user's own model rather than a run."""
    return a.model is not None or (a.data is not None and not is_run(a.path))


def build(a: Namespace) -> nn.Module:
    """What the function of --model returns; random weights are drawn from --seed."""
    if a.model is None:
        raise UsageError("--data goes with --model package.module:build, a function that returns the float model")
    function = load_object(a.model)
    if isinstance(function, nn.Module):
        raise UsageError(f"{a.model!r} is a model, not a function that returns one")
    seed_everything(a.seed or 0)
    model = call(function, a.model)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{a.model!r} returned a {type(model).__name__}, not an nn.Module")
    return model


def batches(a: Namespace) -> Iterable[Any]:
    """What the function of --data returns, called anew each time."""
    if a.data is None:
        raise UsageError("this needs --data package.module:batches, a function that returns an iterable of batches")
    found = call(load_object(a.data), a.data)
    if not isinstance(found, Iterable):
        raise UsageError(f"{a.data!r} returned a {type(found).__name__}, not an iterable of batches")
    return found


def trained(a: Namespace) -> nn.Module:
    """The model of --model with the recipe, weights and steps of FILE, in eval mode."""
    if is_run(a.path):
        raise UsageError(f"{a.path} is a run directory and brings its own model and data: leave out --model and --data")
    return checkpoint.load(build(a), a.path).eval()


def calibrate(a: Namespace, recipe: Recipe) -> Outcome:
    """Prepare and calibrate the user's model and write lsquant.save's file."""
    path = Path(a.out)
    if path.exists() and not a.overwrite:
        raise UsageError(f"{path} exists: --overwrite replaces it")
    model = build(a)
    if a.init is not None:
        load_float(model, a.init)
    changes = prepare(model, recipe, next(iter(take(batches(a), 1))))
    limit = 32 if a.max_batches is None else a.max_batches
    rule, inputs = a.weight_init or "mse", a.activation_init or "mse"
    message(f"calibrating on at most {limit} batches of {a.data}", a.quiet)
    found = {layer.weight_quantizer for _, layer in quantized_layers(model)}
    count = sum(quantizer.step.numel() for quantizer in found if quantizer is not None)
    if rule == "mse" and count > MANY:
        about = "--weight-init paper is instant, and poor at 8 bits without training"
        message(f"{count:,} weight steps by least squared error, about 10 ms each; {about}", a.quiet)
    calibration.calibrate(model, batches(a), max_batches=limit, method=inputs, weights=rule)
    sources = {name: layer.input_quantizer for name, layer in quantized_layers(model)}
    decided = {name: str(source.spec) for name, source in sources.items() if source is not None}  # signs too
    changes = type(changes)(replace(c, activation=decided.get(c.name, c.activation)) for c in changes)
    checkpoint.save(model.eval(), path)
    size = path.stat().st_size
    result = {"file": str(path), "bytes": size, "weight_share": changes.weight_share}
    return {**result, "layers": [asdict(c) for c in changes]}, f"{changes}\n{path}: {size:,} bytes", True


def export(a: Namespace) -> Outcome:
    """Write FILE's integers, beside it unless --out says where."""
    model = trained(a)
    path = Path(a.out) if a.out else Path(a.path).with_suffix(f".{file_format(a.profile).file_name}")
    example = next(iter(take(batches(a), 1)))
    return written(a, model, path, example, map_tensors(example, lambda t: t[:VECTORS] if t.dim() else t))


def written(a: Namespace, model: nn.Module, path: Path, example: Any, few: Any) -> Outcome:
    """The outcome of ``export``.  few: a batch for --vectors."""
    row = file_format(a.profile)
    options = {} if a.opset is None else {"opset": a.opset}
    for name in options:
        if name not in row.options:
            takers = ", ".join(other.name for other in file_formats().values() if name in other.options)
            raise UsageError(f"--{name} is an option of the profiles {takers}: leave it out with --profile {row.name}")
    row.write(model, path, example, **options)
    result = {"file": str(path), "profile": row.name, "bytes": path.stat().st_size}
    text = f"{path}: {result['bytes']:,} bytes"
    header = row.header_size(path)
    if header is not None:
        result["header"] = header
        text += f", {header:,} of them header"
    if a.vectors:
        result["vectors"] = str(export_vectors(model, a.vectors, few))
        text += f"\n{a.vectors}; on the device: python {CHECKER} FILE.onnx {Path(a.vectors).name}"
    return result, text, True


def verify_(a: Namespace) -> Outcome:
    """Compare the exported file with FILE's model on the batches of --data."""
    model = trained(a)
    path = Path(a.file) if a.file else Path(a.path).with_suffix(f".{file_format(a.profile).file_name}")
    return judged(a, model, path, batches(a))


def judged(a: Namespace, model: nn.Module, path: Path, data: Iterable[Any]) -> Outcome:
    """The outcome of ``verify``; the verdict is kept beside a file in its usual place."""
    row = file_format(a.profile)
    if not path.is_file():
        how = f"lsquant export {a.path} --profile {row.name}"
        raise MissingFile(f"{path} does not exist: {how}{' ...' if is_own(a) else ''} writes it")
    if a.profile and a.runtime is not None and a.runtime not in row.runtimes:
        raise UsageError(f"--runtime {a.runtime} does not run files of profile {row.name}: leave it out")
    if a.file and a.profile and (found := profile_of(path)) != a.profile:
        raise UsageError(f"{path} has the profile {found}, not {a.profile}: --file needs no --profile")
    where = {"runtime": a.runtime, "node_modules": a.node_modules}
    verdict = verify(model, path, data, max_batches=a.max_batches, **where)
    result = {"required": a.require, **verdict.to_dict(), "text": str(verdict)}
    if not a.file:
        kind = "" if a.runtime in (None, *row.runtimes[:1]) else f".{a.runtime}"
        write_json(path.with_suffix(f"{kind}.verdict.json"), result)
    if verdict.reaches(a.require):
        return result, str(verdict), True
    return result, f"{verdict}\nrequired: {a.require}{_promised(verdict)}", False


def _promised(verdict: Verdict) -> str:
    """Return what the format of a file promises, where the file keeps that."""
    promise = file_format(verdict.profile).promise
    if not verdict.reaches(promise) or promise == LEVELS[-1]:
        return ""
    return f" (profile {verdict.profile} promises {promise}: --require {promise})"


def report(a: Namespace) -> Outcome:
    """Write the page about FILE's quantizers, and the verdicts that `verify` left beside it."""
    model, file = trained(a), Path(a.path)
    path = Path(a.out) if a.out else file.with_suffix(".html")
    data = None if a.data is None else batches(a)
    found = [read_json(one) for one in sorted(file.parent.glob(f"{escape(file.stem)}.*verdict.json"))]
    write_report(model, path, data, max_batches=a.max_batches or 32, title=file.name, verdicts=found)
    levels = {v["profile"]: v["level"] for v in found if v["runtime"].startswith(("ONNX", "PyTorch"))}
    return {"report": str(path), "verdicts": levels}, str(path), True


def findings(found: list[Finding]) -> Outcome:
    """The result of ``check``: not good when one is an error.  Of many alike a few are shown, --json has all."""
    counts = {f"{severity}s": sum(f.severity == severity for f in found) for severity in SEVERITIES}
    lines = []
    for code, number in Counter(f.code for f in found).items():
        alike = [f for f in found if f.code == code]
        lines += [str(f) for f in islice(alike, SHOWN)]
        if number > SHOWN:
            lines.append(f"    and {number - SHOWN} more [{code}]: {', '.join(f.where for f in alike[SHOWN:])}")
    lines.append(
        ", ".join(f"{n} {name if n != 1 else name[:-1]}" for name, n in counts.items()) if found else "no findings"
    )
    return {"findings": [asdict(f) for f in found], **counts}, "\n".join(lines), not counts["errors"]
