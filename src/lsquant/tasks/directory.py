"""The run directory: what is in it, how it is made, found again and cleared.

config.toml        kind "lsquant run", format; the task, its options and the settings; the folder it was started from
recipe.toml        bits by layer
env.json           versions and hardware, as the run was started
log.jsonl          one row an epoch: loss, learning rates, metrics, time, every quantizer's step, R, guards, clip rate,
                   oscillation
metrics.json       the results: float, teacher, rounded (the float network at these bits, untrained), lsq
model.safetensors  the trained network: weights, steps, recipe
last/              what a killed run is resumed from: float.safetensors, lsq.safetensors, teacher.safetensors,
                   start.safetensors, and for progressive bits lsq-8.safetensors and the like
export/            exported files
report.html        the report
tensorboard/       with --tensorboard: the numbers of log.jsonl, a folder for each phase
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lsquant import checkpoint
from lsquant._util.errors import DamagedFile, MissingFile, UsageError
from lsquant._util.files import atomic_write, atomic_write_text, remove_leftovers, write_json
from lsquant._util.toml import to_toml
from lsquant._version import __version__
from lsquant.diagnostics.environment import environment
from lsquant.nn import quantizers
from lsquant.recipe import Recipe
from lsquant.report.run_files import latest, log_rows
from lsquant.tasks.protocol import Settings, Task
from lsquant.tasks.registry import get_task

KIND = "lsquant run"
TEACHER = "last/teacher.safetensors"
START = "last/start.safetensors"
FORMAT = 1  # of the directory; a newer one is refused
_CONTENT = (
    "recipe.toml",
    "env.json",
    "log.jsonl",
    "metrics.json",
    "model.safetensors",
    "last",
    "export",
    "report.html",
    "tensorboard",
    "config.toml",
)  # fmt: skip  (config.toml marks the directory: it goes last)


@dataclass(frozen=True)
class Run:
    """A run: where it is and everything that decides its numbers.

    `init`: the float checkpoint it starts from; `teacher`: another float checkpoint, which it is trained against, and
    the SHA-256 of that file (None: taken when the run starts); `start`: a file of ``export_packed`` or ``save``, whose
    weights and steps are trained further (steps are calibrated anew where its recipe is another), nothing in float.
    """

    path: Path
    task: Task
    recipe: Recipe
    settings: Settings
    init: str | None = None
    teacher: str | None = None
    teacher_sha256: str | None = None
    start: str | None = None

    def config(self) -> dict[str, Any]:
        """The content of config.toml."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "lsquant": __version__,
            "task": getattr(self.task, "source", self.task.name),
            "init": self.init,
            "teacher": self.teacher,
            "teacher_sha256": self.teacher_sha256,
            "start": self.start,
            "options": dict(self.task.options),
            "settings": self.settings.to_dict(),
        }

    @property
    def trains_float(self) -> bool:
        """Whether it trains its float network: it has neither `init` nor `start`."""
        return self.init is None and self.start is None

    def file(self, name: str) -> Path:
        return self.path / name

    def model(self) -> nn.Module:
        """The trained network, guarded steps counted as in the log. Raises: MissingFile if the run is not finished."""
        if not self.file("model.safetensors").is_file():
            raise MissingFile(
                f"{self.path} has no model.safetensors: the run is not finished, go on with it by --resume"
            )
        model = checkpoint.load(self.task.model(), self.file("model.safetensors"))
        logged = latest(log_rows(self.file("log.jsonl"), []))
        for name, quantizer in quantizers(model):
            quantizer.guarded.fill_(int(logged.get(name, {}).get("guarded") or 0))
        return model


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory whose config.toml says so."""
    try:
        return tomllib.loads((Path(path) / "config.toml").read_text(encoding="utf-8")).get("kind") == KIND
    except (OSError, ValueError):
        return False


def open_run(path: str | os.PathLike[str], **options: Any) -> Run:
    """The run in the directory `path`; `options` replace the task's own, as data="DIR" where its data has moved.

    A relative path in it counts from the folder that the run was started from, or from here where it is not there.

    Raises: MissingFile if there is none; DamagedFile for an unreadable or newer config.toml.
    """
    folder = Path(path)
    config = folder / "config.toml"
    if not config.is_file():
        raise MissingFile(f"{folder} is no run directory: it has no config.toml")
    try:
        values = tomllib.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(f"{config} is not valid TOML: {error}") from error
    if (values.get("kind"), values.get("format")) != (KIND, FORMAT):
        raise DamagedFile(
            f"{config} says kind {values.get('kind')!r}, format {values.get('format')!r}; "
            f"this version reads {KIND!r}, format {FORMAT}"
        )
    if not (folder / "recipe.toml").is_file():
        raise MissingFile(f"{folder} has no recipe.toml: start it anew with --overwrite")
    try:
        recipe = Recipe.from_toml((folder / "recipe.toml").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(f"{folder / 'recipe.toml'} is damaged: {error}") from error
    if not {"task", "settings"} <= values.keys():
        raise DamagedFile(f"{config} has no task or no settings: it was cut")
    source, started = values["task"], Path(values.get("folder", "."))
    stored = {} if ":" in source else values.get("options", {})
    if isinstance(data := stored.get("data"), str):
        stored["data"] = _found(data, started)
    if ":" in source:
        place, _, name = source.rpartition(":")
        source = f"{_found(place, started)}:{name}"
    task = get_task(source, **{**stored, **options})
    files = {name: _found(file, started) for name in ("init", "teacher", "start") if (file := values.get(name))}
    settings, digest = Settings.from_dict(values["settings"]), values.get("teacher_sha256")
    return Run(folder, task, recipe, settings, teacher_sha256=digest, **files)


def _found(path: str, started: Path) -> str:
    """`path` from here, or in the folder that the run was started from if that is another and has it."""
    return str(started / path) if started.resolve() != Path.cwd() and (started / path).exists() else path


def start_run(run: Run, *, resume: bool = False, overwrite: bool = False) -> None:
    """Make the directory of `run`; with `resume` it may exist if it is of the same run, with `overwrite` of any run.

    Raises: UsageError for an existing directory that is neither, naming --resume and --overwrite.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        if resume and run.path.is_dir():
            remove_leftovers(run.path)
            return _check_same(run, open_run(run.path))
        if not overwrite:
            raise UsageError(f"{run.path} exists: --resume goes on with it, --overwrite starts anew")
        if not is_run(run.path):
            raise UsageError(f"{run.path} exists and is no run directory: --overwrite deletes nothing else")
        for file in (run.init, run.teacher, run.start):
            if file is not None and run.path.resolve() in Path(file).resolve().parents:
                raise UsageError(f"{file} lies in the run that --overwrite would delete: choose another --out")
    # made aside and renamed: a directory that is there is complete, whenever this process is killed
    aside = run.path.with_name(f".{run.path.name}.{os.getpid()}.tmp")
    for folder in (aside, aside / "last", aside / "export"):
        folder.mkdir(parents=True, exist_ok=True)
    for file, name in ((run.teacher, TEACHER), (run.start, START)):
        if file is not None:
            with atomic_write(aside / name) as copy:
                shutil.copyfile(file, copy)
    if run.teacher is not None:
        check_teacher(run, aside / TEACHER)
    atomic_write_text(aside / "recipe.toml", run.recipe.to_toml())
    write_json(aside / "env.json", {"format": FORMAT, **environment()})
    atomic_write_text(aside / "config.toml", to_toml({**run.config(), "folder": os.getcwd()}))
    if overwrite and is_run(run.path):
        _clear(run.path)
    if run.path.exists() and any(run.path.iterdir()):  # foreign files, which --overwrite left
        for name in _CONTENT:
            if (aside / name).exists():
                os.replace(aside / name, run.path / name)
        aside.rmdir()
    else:
        os.replace(aside, run.path)
    return None


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file's bytes, in hexadecimal. Raises: MissingFile."""
    if not Path(path).is_file():
        raise MissingFile(f"{path} does not exist")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_teacher(run: Run, path: Path) -> None:
    """Raises: MissingFile; DamagedFile if the file at `path` is not the teacher that config.toml names."""
    if (found := sha256(path)) != run.teacher_sha256:
        raise DamagedFile(
            f"{path} is not the teacher of {run.path}: its SHA-256 is {found}, the run was started with "
            f"{run.teacher_sha256}; put that file back, or start anew with --overwrite"
        )


def _clear(path: Path) -> None:
    """Delete what a run makes, and nothing else."""
    for name in _CONTENT:
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _check_same(run: Run, old: Run) -> None:
    def flat(what: Run) -> dict[str, Any]:
        config = what.config()
        config["options"].pop("data", None)  # the same data may lie elsewhere
        return {"recipe": what.recipe, **config.pop("settings"), **config}

    new, found = flat(run), flat(old)
    different = [f"{key} was {found[key]!r}, not {value!r}" for key, value in new.items() if found[key] != value]
    if different:
        raise UsageError(f"{run.path} is another run ({'; '.join(different)}): resume it as it was, or --overwrite it")
