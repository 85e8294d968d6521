"""The commands.  Each returns (result for --json, text, whether it is as required)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lsquant._util.errors import MissingFile, UsageError
from lsquant._version import __version__
from lsquant.cli import own
from lsquant.cli.reporting import report as report
from lsquant.cli.words import measured, results, table
from lsquant.diagnostics import check
from lsquant.diagnostics.environment import environment
from lsquant.formats import file_format
from lsquant.recipe import Recipe
from lsquant.report.figure import draw_figures
from lsquant.tasks import Run, Settings, get_task, is_run, open_run, run_training
from lsquant.tasks.directory import sha256
from lsquant.tasks.run import reader

Outcome = tuple[dict[str, Any], str, bool]
Command = Callable[[Namespace], Outcome]
BATCH = 250
ADAM_LR = 1e-3  # where the optimizer is Adam or AdamW and no --lr is given


def set_up(arguments: Namespace) -> None:
    """Threads and device."""
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UsageError(f"--threads {arguments.threads}: at least 1")
        torch.set_num_threads(arguments.threads)
    if arguments.device != "cpu":
        raise UsageError(f"--device {arguments.device}: only cpu is built yet")


# ---- train and eval ----


def train(a: Namespace) -> Outcome:
    """Train a task, or go on with a run."""
    how = {"checkpoint_every": a.checkpoint_every, "tensorboard": a.tensorboard, "quiet": a.quiet}
    if a.resume and a.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if a.resume and (a.task is None or Path(a.out).exists()):
        run = open_run(a.out, **_options(a, "data"))
        _refuse_changes(a, run)
        metrics = run_training(run, resume=True, **how)
    elif a.task is None:
        raise UsageError("train: name a task (lsquant train digits --bits 2 --out DIR), or --resume a run")
    else:
        task = get_task(a.task, **_options(a, "data", "model"))
        asked = _options(a, *_SETTINGS)
        if a.optimizer not in (None, "sgd"):
            if a.momentum is not None and a.init is not None:
                raise UsageError(f"--momentum has no effect with --init and --optimizer {a.optimizer}: it is SGD's")
            asked = {"lr": ADAM_LR, **asked}
        settings = replace(task.settings, **asked)
        if a.teacher is not None and a.distill is not None:
            raise UsageError("--teacher is a file to distill from: leave out --distill and --no-distill")
        alone = a.teacher is None and a.distill is None and not settings.distill
        for idle in _options(a, "distill_weight", "distill_temperature") if alone else ():
            raise UsageError(f"--{idle.replace('_', '-')} has no effect without --teacher FILE or --distill")
        run = Run(Path(a.out), task, _recipe(a), settings, a.init, a.teacher, start=a.start)
        for idle in _options(a, *_FLOAT) if not run.trains_float else ():
            raise UsageError(f"--{idle.replace('_', '-')} has no effect with --init or --start: no float training")
        metrics = run_training(run, resume=a.resume, overwrite=a.overwrite, **how)
    return (
        {"run": str(a.out), **metrics},
        table([(name, measured(metrics[key])) for key, name in results(metrics)]),
        True,
    )


def _options(a: Namespace, *names: str) -> dict[str, Any]:
    """The task's options that were given on the command line."""
    return {name: value for name in names if (value := getattr(a, name)) is not None}


def _refuse_changes(a: Namespace, run: Run) -> None:
    """--resume takes everything from the run; what is given beside it must be what the run has."""
    asked = _options(a, *_SETTINGS, "init", "teacher", "start", "task", "model")
    has = {**run.task.options, **run.settings.to_dict(), "init": run.init, "teacher": run.teacher, "start": run.start}
    has["task"] = run.config()["task"]
    differ = [f"{name} is {has.get(name)!r}, not {value!r}" for name, value in asked.items() if has.get(name) != value]
    if (a.recipe or a.bits or a.weight_bits or a.activation_bits) and _recipe(a) != run.recipe:
        differ.append("its recipe has other bits")
    if a.teacher is not None and Path(a.teacher).is_file() and sha256(a.teacher) != run.teacher_sha256:
        differ.append(f"{a.teacher} is not the file it was")
    if differ:
        raise UsageError(f"{run.path} is another run ({'; '.join(differ)}): --resume goes on with it as it was started")


_SETTINGS = tuple(Settings.__dataclass_fields__)  # each has an option of its name
_FLOAT = tuple(name for name in _SETTINGS if name.startswith("float_"))  # of the float training


def _recipe(a: Namespace) -> Recipe:
    if a.recipe is not None:
        if a.bits or a.weight_bits or a.activation_bits:
            raise UsageError("give --recipe or bits, not both")
        if not Path(a.recipe).is_file():
            raise MissingFile(f"the recipe {a.recipe} does not exist")
        return Recipe.from_toml(Path(a.recipe).read_text(encoding="utf-8"))
    weight, activation = a.weight_bits or a.bits, a.activation_bits or a.bits
    if weight is None or activation is None:
        raise UsageError("give --bits N, or --weight-bits and --activation-bits, or --recipe FILE")
    if bad := [bits for bits in (weight, activation) if not 2 <= bits <= 8]:
        raise UsageError(f"--bits {bad[0]}: bits are 2 to 8")
    return Recipe.preset(f"w{weight}a{activation}")


def calibrate(a: Namespace) -> Outcome:
    """Quantize the user's own model without training."""
    return own.calibrate(a, _recipe(a))


def _run(a: Namespace) -> Run:
    """The run that RUN names; a file is told what it lacks."""
    if Path(a.path).is_file():
        lacks = "needs --task TASK" if a.run is evaluate else "needs --model package.module:build and --data"
        raise UsageError(f"{a.path} is a file, not a run directory, and {lacks}")
    return open_run(a.path, **_options(a, "data"))


def evaluate(a: Namespace) -> Outcome:
    """The metric of a run's trained model, or by the task of --task of a float checkpoint, a saved or a packed file."""
    if a.task is None or is_run(a.path):
        run = _run(a)
        if a.task is not None or a.model is not None:
            raise UsageError(f"{a.path} is a run and brings its own model: leave out --task and --model")
        task, model = run.task, run.model()
    else:
        task = get_task(a.task, **_options(a, "data", "model"))
        model = reader(a.path)(task.model(), a.path)
    metrics = task.metric(model)
    return metrics, measured(metrics), True


# ---- export and verify ----


def export(a: Namespace) -> Outcome:
    """Write the file of --profile in RUN/export."""
    if own.is_own(a):
        return own.export(a)
    run = _run(a)
    path = Path(a.out) if a.out else run.file(f"export/{file_format(a.profile).file_name}")
    if not a.out:
        path.parent.mkdir(exist_ok=True)
    few = next(iter(run.task.batches("test", batch_size=own.VECTORS))) if a.vectors else None
    return own.written(a, run.model(), path, run.task.example_input(), few)


def verify_(a: Namespace) -> Outcome:
    """Compare the file with the model on the whole test set; keeps the verdict beside the file."""
    if own.is_own(a):
        return own.verify_(a)
    run = _run(a)
    path = Path(a.file) if a.file else run.file(f"export/{file_format(a.profile).file_name}")
    return own.judged(a, run.model(), path, run.task.batches("test", batch_size=BATCH))


# ---- check, figure, env; report is in reporting.py ----


def check_(a: Namespace) -> Outcome:
    """What is wrong with a trained model; not good when a finding is an error."""
    limit = 8 if a.max_batches is None else a.max_batches
    if own.is_own(a):
        return own.findings(
            check(own.trained(a), batches=None if a.data is None else own.batches(a), max_batches=limit)
        )
    run = _run(a)
    batches = run.task.batches("calibration", batch_size=BATCH, seed=run.settings.seed)
    return own.findings(check(run.model(), batches=batches, max_batches=limit))


def figure(a: Namespace) -> Outcome:
    """staircase.svg and staircase.png in a folder."""
    paths = [str(p) for p in draw_figures(a.out, bits=a.bits, signed=a.signed, offset=a.offset)]
    return {"files": paths}, "\n".join(paths), True


def env(a: Namespace) -> Outcome:
    """Versions and hardware."""
    facts = {"lsquant": __version__, **environment()}
    rows = [(key, value) for key, value in facts.items() if key not in ("engines", "packages")]
    rows += [(f"engine {name}", state) for name, state in facts["engines"].items()]
    rows += list(facts["packages"].items())
    return facts, table([(k, ", ".join(v) if isinstance(v, list) else str(v)) for k, v in rows]), True
