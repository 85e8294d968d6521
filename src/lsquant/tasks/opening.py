"""Open a run directory together with its task."""

from __future__ import annotations

import os
from typing import Any

from lsquant._util.entry import shown
from lsquant._util.errors import UsageError
from lsquant.runs.directory import Run, read_run
from lsquant.runs.training import run_training
from lsquant.tasks.registry import get_task


def open_run(path: str | os.PathLike[str], task: str | None = None, **options: Any) -> Run:
    """Return the run in the directory `path`.

    task: FILE.py:task of a user's own task; such a run needs it, because nothing that a file names is run
    options: replace the task's own, as data="DIR" where its data has moved

    A relative path in it counts from the folder that the run was started from, or from here where it is not there.

    Raises: MissingFile if there is none; DamagedFile for an unreadable or newer config.toml; UsageError for a task of
    a user's own that was not named; what `get_task` raises.
    """
    stored = read_run(path)
    name = stored.task_name
    if ":" not in name:
        if task not in (None, name):
            raise UsageError(f"{path} is a run of the task {name!r}, not of {task!r}")
        return stored.with_task(get_task(name, **{**stored.options, **options}))
    if task is None:
        raise UsageError(
            f"{path} is a run of the task {shown(name)}, code in a file, and nothing that a run directory names is "
            "run: if you trust that file, name it with --task FILE.py:task (task= of open_run)"
        )
    found: Any = get_task(task, **options)
    if _same_place(task, name):
        found.source = name
    return stored.with_task(found)


def _same_place(one: str, other: str) -> bool:
    """Tell whether two FILE.py:task are the same, from wherever they are seen."""
    (file, _, member), (other_file, _, other_member) = one.rpartition(":"), other.rpartition(":")
    return member == other_member and os.path.realpath(file) == os.path.realpath(other_file)


def resume_training(
    path: str | os.PathLike[str], task: str | None = None, *, checkpoint_every: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Go on with the run in the directory `path` with the settings it was started with.  task: as for `open_run`."""
    return run_training(open_run(path, task), resume=True, checkpoint_every=checkpoint_every, quiet=quiet)
