"""Open a run directory together with its task."""

from __future__ import annotations

import os
from typing import Any

from lsquant.runs.directory import Run, read_run
from lsquant.runs.training import run_training
from lsquant.tasks.registry import get_task


def open_run(path: str | os.PathLike[str], **options: Any) -> Run:
    """Return the run in the directory `path`.

    options: replace the task's own, as data="DIR" where its data has moved

    A relative path in it counts from the folder that the run was started from, or from here where it is not there.

    Raises: MissingFile if there is none; DamagedFile for an unreadable or newer config.toml; what `get_task` raises.
    """
    stored = read_run(path)
    return stored.with_task(get_task(stored.task_name, **{**stored.options, **options}))


def resume_training(
    path: str | os.PathLike[str], *, checkpoint_every: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Go on with the run in the directory `path` with the settings it was started with."""
    return run_training(open_run(path), resume=True, checkpoint_every=checkpoint_every, quiet=quiet)
