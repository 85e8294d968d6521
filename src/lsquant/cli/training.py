"""``lsquant train``: train a task, or go on with a run; and the recipe that the options ask for."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from lsquant._util.entry import LARGEST_TOML, read_text
from lsquant._util.errors import MissingFile, UsageError
from lsquant.cli.outcome import Outcome
from lsquant.cli.subject import given
from lsquant.cli.words import measured, results, table
from lsquant.recipe import PRESET, Recipe, recipe_of_file
from lsquant.runs.directory import sha256
from lsquant.tasks import TASKS, Run, Settings, Task, get_task, open_run, run_training
from lsquant.tasks.text import Text

ADAM_LR = 1e-3  # where the optimizer is Adam or AdamW and no --lr is given
_SETTINGS = tuple(Settings.__dataclass_fields__)  # each has an option of its name
_TASK = (
    "data",
    "valid",
    "model",
    "sequence",
    "eval_tokens",
    "activation_checkpointing",
    "float_embeddings",
)  # options of tasks
_FLOAT = tuple(name for name in _SETTINGS if name.startswith("float_"))  # of the float training


def train(a: Namespace) -> Outcome:
    """Train a task, or go on with a run."""
    how = {"checkpoint_every": a.checkpoint_every, "tensorboard": a.tensorboard, "quiet": a.quiet}
    if a.resume and a.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    _single(a)
    if a.resume and (a.task is None or Path(a.out).exists()):
        run = open_run(a.out, **given(a, "task", *_TASK[:2]))
        _refuse_changes(a, run)
        metrics = run_training(run, resume=True, **how)
    elif a.task is None:
        raise UsageError("train: name a task (lsquant train digits --bits 2 --out DIR), or --resume a run")
    else:
        task = get_task(a.task, **given(a, *_TASK))
        run = Run(Path(a.out), task, recipe_of(a, task), _settings(a, task), a.init, a.teacher, start=a.start)
        if not run.trains_float:
            _refuse_idle(a, _FLOAT, "with --init or --start: no float training")
        metrics = run_training(run, resume=a.resume, overwrite=a.overwrite, **how)
    text = table([(name, measured(metrics[key])) for key, name in results(metrics)])
    return Outcome({"run": str(a.out), **metrics}, text)


def _settings(a: Namespace, task: Task) -> Settings:
    """Return the task's settings with those of the command line."""
    asked = given(a, *_SETTINGS)
    if a.optimizer not in (None, "sgd") and task.settings.optimizer == "sgd":
        if a.momentum is not None and a.init is not None:
            raise UsageError(f"--momentum has no effect with --init and --optimizer {a.optimizer}: it is SGD's")
        asked = {"lr": ADAM_LR, **asked}
    settings = replace(task.settings, **asked)
    if a.teacher is not None and a.distill is not None:
        raise UsageError("--teacher is a file to distill from: leave out --distill and --no-distill")
    if a.teacher is None and a.distill is None and not settings.distill:
        _refuse_idle(a, ("distill_weight", "distill_temperature"), "without --teacher FILE or --distill")
    if not settings.fold_epochs:
        _refuse_idle(a, ("fold_lr",), "without --fold-epochs")
    return settings


def _refuse_idle(a: Namespace, names: tuple[str, ...], why: str) -> None:
    """Raise UsageError naming the first of these options that was given."""
    for name in given(a, *names):
        raise UsageError(f"--{name.replace('_', '-')} has no effect {why}")


def _refuse_changes(a: Namespace, run: Run) -> None:
    """Raise UsageError where options beside --resume say something else than the run, which has them all."""
    asked = given(a, *_SETTINGS, *_TASK[2:], "init", "teacher", "start", "model")
    has = {**run.task.options, **run.settings.to_dict(), "init": run.init, "teacher": run.teacher, "start": run.start}
    differ = [f"{name} is {has.get(name)!r}, not {value!r}" for name, value in asked.items() if has.get(name) != value]
    has_bits = a.recipe or a.bits or a.weight_bits or a.activation_bits or a.integer_only or a.target
    if has_bits and recipe_of(a, run.task) != run.recipe:
        differ.append("its recipe has other bits")
    if a.teacher is not None and Path(a.teacher).is_file() and sha256(a.teacher) != run.teacher_sha256:
        differ.append(f"{a.teacher} is not the file it was")
    if differ:
        raise UsageError(f"{run.path} is another run ({'; '.join(differ)}): --resume goes on with it as it was started")


def _single(a: Namespace) -> None:
    """Take one name of --data as the place of the data, and a task's name behind several ones as the task."""
    for files in (a.data, a.valid):
        if files and a.task is None and files[-1] in TASKS:  # train --data DIR cifar10
            a.task = files.pop()
    if a.data is not None and len(a.data) == 1:
        a.data = a.data[0]


def recipe_of(a: Namespace, task: Task | None = None) -> Recipe:
    """Return the recipe of --recipe, a file or a preset's name, or of the bits."""
    if a.recipe is not None:
        if a.bits or a.weight_bits or a.activation_bits or a.integer_only or a.target:
            raise UsageError(
                "give --recipe or bits, not both; a recipe says joins = 8 instead of --integer-only, and "
                'target = "NAME" instead of --target'
            )
        if not Path(a.recipe).is_file():
            if isinstance(task, Text):
                return task.preset(a.recipe)
            if PRESET.fullmatch(a.recipe.lower()):
                return Recipe.preset(a.recipe)
            raise MissingFile(f"the recipe {a.recipe} does not exist")
        return recipe_of_file(read_text(a.recipe, LARGEST_TOML), a.recipe, UsageError)
    weight, activation = a.weight_bits or a.bits, a.activation_bits or a.bits
    if weight is None or activation is None:
        raise UsageError("give --bits N, or --weight-bits and --activation-bits, or --recipe FILE")
    if bad := [bits for bits in (weight, activation) if not 2 <= bits <= 8]:
        raise UsageError(f"--bits {bad[0]}: bits are 2 to 8")
    if a.target and not a.integer_only:
        raise UsageError(f"--target {a.target} is for integer-only networks: give --integer-only as well")
    target = a.target or "onnxruntime"
    return Recipe.preset(f"w{weight}a{activation}", integer_only=a.integer_only, target=target)
