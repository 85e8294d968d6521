"""The run directory: what is in it, how it is made, read again and cleared.

config.toml        kind "lsquant run", format; the task, its options and the settings; the folder it was started from
recipe.toml        bits by layer
env.json           versions and hardware, as the run was started
log.jsonl          one row an epoch: loss, learning rates, metrics, time, every quantizer's step, R, guards, clip rate,
                   oscillation
metrics.json       the results: float, teacher, rounded (the float network at these bits, untrained), lsq, fused
model.safetensors  the trained network: weights, steps, recipe
last/              what a killed run is resumed from: float.safetensors, lsq.safetensors, teacher.safetensors,
                   start.safetensors, and for progressive bits lsq-8.safetensors and the like
export/            exported files
report.html        the report
.lock, .lock.json  while a process trains the run: its lock, and who that is
tensorboard/       with --tensorboard: the numbers of log.jsonl, a folder for each phase
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lsquant import checkpoint
from lsquant._util.entry import LARGEST_TOML, Entry, read_text, read_toml, shown
from lsquant._util.errors import DamagedFile, LsquantError, MissingFile, UsageError
from lsquant._util.files import (
    atomic_write,
    atomic_write_text,
    cannot_write,
    remove_leftovers,
    require_no_link,
    write_json,
)
from lsquant._util.toml import to_toml
from lsquant._version import __version__
from lsquant.diagnostics.environment import environment
from lsquant.fusion import fuse
from lsquant.nn import quantizers
from lsquant.recipe import Recipe, recipe_of_file
from lsquant.runs.lock import HOLDER, LOCK, RunLock
from lsquant.runs.log_reader import latest, log_rows
from lsquant.runs.settings import Settings
from lsquant.runs.task import Task
from lsquant.tracing import trace

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
    """Describe a run: its directory and everything that decides its numbers.

    path: the run directory
    task, recipe, settings: what is trained, at which bits, and how
    init: a float checkpoint instead of float training
    teacher: another float checkpoint, to distill from
    teacher_sha256: SHA-256 of that file; None: taken when the run starts
    start: a file of `export_packed` or `save` whose weights and steps are trained further, without float training; the
        steps are calibrated anew where its recipe is another
    """

    path: Path
    task: Task
    recipe: Recipe
    settings: Settings
    init: str | None = None
    teacher: str | None = None
    teacher_sha256: str | None = None
    start: str | None = None

    @property
    def task_name(self) -> str:
        """The task as config.toml names it: its name, or FILE.py:task of a user's own."""
        return getattr(self.task, "source", self.task.name)

    def config(self) -> dict[str, Any]:
        """Return the content of config.toml."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "lsquant": __version__,
            "task": self.task_name,
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

    def network(self) -> nn.Module:
        """Load what the run is judged by: the trained network, for a recipe with joins in its integer-only form."""
        model = self.model()
        return model if self.recipe.joins is None else fuse(model)

    def float_model(self) -> nn.Module:
        """Build the task's network; for a recipe with joins with modules in the place of functions (`trace`).

        Raises: UsageError naming what cannot be traced.
        """
        model = self.task.model()
        if self.recipe.joins is not None:
            trace(model, self.task.example_input())
        return model

    def file(self, name: str) -> Path:
        return self.path / name

    def model(self) -> nn.Module:
        """Load the trained network, with guarded steps counted as in the log.

        Raises: MissingFile if the run is not finished.
        """
        if not self.file("model.safetensors").is_file():
            raise MissingFile(
                f"{self.path} has no model.safetensors: the run is not finished; --resume goes on with it"
            )
        model = checkpoint.load(self.float_model(), self.file("model.safetensors"))
        logged = latest(log_rows(self.file("log.jsonl"), []))
        for name, quantizer in quantizers(model):
            quantizer.guarded.fill_(int(min(2**53, max(0, logged.get(name, {}).get("guarded", 0)))))
        return model


@dataclass(frozen=True)
class StoredRun:
    """A run as its config.toml and recipe.toml describe it, its task by name; the other fields are those of `Run`.

    task_name: a name, or FILE.py:task of a user's own
    options: the arguments its task was made with; empty for a user's own, which brings them
    """

    path: Path
    task_name: str
    options: dict[str, Any]
    recipe: Recipe
    settings: Settings
    init: str | None
    teacher: str | None
    teacher_sha256: str | None
    start: str | None

    def with_task(self, task: Task) -> Run:
        """Return the run of that task."""
        return Run(
            self.path,
            task,
            self.recipe,
            self.settings,
            init=self.init,
            teacher=self.teacher,
            teacher_sha256=self.teacher_sha256,
            start=self.start,
        )


def is_run(path: str | os.PathLike[str]) -> bool:
    """Tell whether `path` is a directory whose config.toml says that it is a run."""
    try:
        return read_toml(Path(path) / "config.toml").value.get("kind") == KIND
    except LsquantError:
        return False


def read_run(path: str | os.PathLike[str]) -> StoredRun:
    """Read config.toml and recipe.toml of the run directory `path`.

    A relative path in it counts from the folder that the run was started from, or from here where it is not there.

    Raises: MissingFile if there is none; DamagedFile for an unreadable or newer config.toml.
    """
    folder = Path(path)
    config = folder / "config.toml"
    if not config.is_file():
        raise MissingFile(f"{folder} is no run directory: it has no config.toml")
    document = read_toml(config)
    kind, version = document.value.get("kind"), document.value.get("format")
    if kind != KIND or type(version) is not int or version != FORMAT:
        raise DamagedFile(
            f"{config} says kind {shown(kind)}, format {shown(version)}; this version reads {KIND!r}, format {FORMAT}"
        )
    if not {"task", "settings"} <= document.value.keys():
        raise DamagedFile(f"{config} has no task or no settings: it was cut")
    values = document.parts()
    recipe = _read_recipe(folder)
    started = Path(_text(values, "folder") or ".")
    name, options = values["task"].text(), _options(values)
    if ":" in name:
        place, _, member = name.rpartition(":")
        name, options = f"{_found(place, started)}:{member}", {}
    if isinstance(data := options.get("data"), str):
        options["data"] = _found(data, started)
    try:
        settings = Settings.from_dict({key: entry.value for key, entry in values["settings"].table().items()})
    except UsageError as error:
        values["settings"].refuse(str(error))

    def file(key: str) -> str | None:
        return _found(path, started) if (path := _text(values, key)) else None

    return StoredRun(
        folder,
        name,
        options,
        recipe,
        settings,
        init=file("init"),
        teacher=file("teacher"),
        teacher_sha256=_text(values, "teacher_sha256"),
        start=file("start"),
    )


def _text(values: dict[str, Entry], key: str) -> str | None:
    """Return a text of config.toml; None where it is left out."""
    return values[key].text() if key in values else None


def _options(values: dict[str, Entry]) -> dict[str, Any]:
    """Return the options of the task: words, numbers, truth values and lists of them."""
    found = values["options"].table(100) if "options" in values else {}
    for entry in found.values():
        for one in entry.items(1000) if isinstance(entry.value, list) else [entry]:
            if isinstance(one.value, str):
                one.text()
            elif isinstance(one.value, int):
                one.require(one.value.bit_length() < 64, "an integer beyond 64 bits")
            else:
                one.require(isinstance(one.value, float), f"{shown(one.value)} is no option of a task")
    return {name: entry.value for name, entry in found.items()}


def _read_recipe(folder: Path) -> Recipe:
    file = folder / "recipe.toml"
    if not file.is_file():
        raise MissingFile(f"{folder} has no recipe.toml: start it anew with --overwrite")
    return recipe_of_file(read_text(file, LARGEST_TOML), str(file))


def _found(path: str, started: Path) -> str:
    """Return `path` in the folder that the run was started from if that is another and has it, else as from here."""
    elsewhere = started / path
    try:
        return str(elsewhere) if started.resolve() != Path.cwd() and elsewhere.exists() else path
    except (OSError, RuntimeError):  # a name that is too long, links that lead in a circle
        return path


def start_run(run: Run, *, resume: bool = False, overwrite: bool = False) -> RunLock:
    """Make the directory of `run`, and lock it.

    resume: it may exist if it is of the same run
    overwrite: it may exist if it is of any run, which is deleted
    Returns: the lock, to be released when the training ends; it ends with the process as well.

    Raises: UsageError for an existing directory that is neither, naming --resume and --overwrite, and for one in which
    a process trains, naming it; CannotWrite.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    exists = run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir()))
    if exists and resume and run.path.is_dir():
        stored = read_run(run.path)  # before anything is written into a folder that is no run
        require_no_links(run.path)
        lock = RunLock(run.path)
        try:
            remove_leftovers(run.path)
            _check_same(run, stored)
        except BaseException:
            lock.release()
            raise
        return lock
    if exists:
        _check_replaceable(run, overwrite)
    # made aside and renamed: a directory that is there is complete, whenever this process is killed
    aside = run.path.with_name(f".{run.path.name}.{os.getpid()}.tmp")
    try:
        if not exists:
            _fill(aside, run)
            os.replace(aside, run.path)
            return RunLock(run.path)
        with RunLock(run.path):
            _fill(aside, run)
            _clear(run.path)
            foreign = [entry for entry in run.path.iterdir() if entry.name not in (LOCK, HOLDER)]
            if foreign:  # which --overwrite leaves
                for name in _CONTENT:
                    if (aside / name).exists():
                        os.replace(aside / name, run.path / name)
                aside.rmdir()
        if aside.exists():
            os.replace(aside, run.path)
        return RunLock(run.path)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UsageError(f"another process has just made {run.path}: choose another --out") from error
        if isinstance(error, OSError) and not isinstance(error, LsquantError):
            raise cannot_write(run.path, error) from error
        raise


def _check_replaceable(run: Run, overwrite: bool) -> None:
    """Raise UsageError unless --overwrite is given, for a run directory that holds nothing the run needs."""
    if not overwrite:
        raise UsageError(f"{run.path} exists: --resume goes on with it, --overwrite starts anew")
    if not is_run(run.path):
        raise UsageError(f"{run.path} exists and is no run directory: --overwrite deletes nothing else")
    for file in (run.init, run.teacher, run.start):
        if file is not None and run.path.resolve() in Path(file).resolve().parents:
            raise UsageError(f"{file} lies in the run that --overwrite would delete: choose another --out")


def _fill(folder: Path, run: Run) -> None:
    """Write what a run directory has before anything is trained."""
    for part in (folder, folder / "last", folder / "export"):
        part.mkdir(parents=True, exist_ok=True)
    for file, name in ((run.teacher, TEACHER), (run.start, START)):
        if file is not None:
            with atomic_write(folder / name) as copy:
                shutil.copyfile(file, copy)
    if run.teacher is not None:
        check_teacher(run, folder / TEACHER)
    atomic_write_text(folder / "recipe.toml", _by_name(run.recipe, run.task).to_toml())
    write_json(folder / "env.json", {"format": FORMAT, **environment()})
    atomic_write_text(folder / "config.toml", to_toml({**run.config(), "folder": os.getcwd()}))


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of the file's bytes, in hexadecimal. Raises: MissingFile."""
    if not Path(path).is_file():
        raise MissingFile(f"{path} does not exist")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_teacher(run: Run, path: Path) -> None:
    """Raise MissingFile; DamagedFile if the file at `path` is not the teacher that config.toml names."""
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


def require_no_links(path: Path) -> None:
    """Raise UsageError for a symbolic link among the files of a run: a stranger's directory may lead anywhere."""
    for name in _CONTENT:
        require_no_link(path / name)
        for folder, folders, files in os.walk(path / name):
            for entry in (*folders, *files):
                require_no_link(os.path.join(folder, entry))


def _check_same(run: Run, stored: StoredRun) -> None:
    """Raise UsageError naming what differs between `run` and the one in its directory."""
    new, old = _compared(run, run.task_name), _compared(stored, stored.task_name)
    new["recipe"], old["recipe"] = (_by_name(one.recipe, run.task) for one in (run, stored))
    different = [f"{key} was {old[key]!r}, not {value!r}" for key, value in new.items() if old[key] != value]
    if ":" not in stored.task_name:  # a user's own task brings its options
        before = {key: value for key, value in stored.options.items() if key != "data"}  # data may lie elsewhere
        given = _as_stored(run.task.options)
        now = {key: given.get(key) for key in before}
        different += [f"options was {before!r}, not {now!r}"] if before != now else []
    if different:
        raise UsageError(f"{run.path} is another run ({'; '.join(different)}): resume it as it was, or --overwrite it")


def _by_name(recipe: Recipe, task: Task) -> Recipe:
    """Return the recipe without classes and regular expressions, as recipe.toml has it."""
    return recipe if recipe.has_only_names else recipe.with_names(task.model())


def _compared(run: Run | StoredRun, task_name: str) -> dict[str, Any]:
    """Return what must be equal for a run to go on, its options apart."""
    return {
        **run.settings.to_dict(),
        "task": task_name,
        "init": run.init,
        "teacher": run.teacher,
        "teacher_sha256": run.teacher_sha256,
        "start": run.start,
    }


def _as_stored(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as config.toml gives them back: without None, tuples as lists."""
    return tomllib.loads(to_toml(options))
