"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from lsquant._util.errors import UsageError
from lsquant.tasks.digits import Digits
from lsquant.tasks.protocol import Task

TASKS: dict[str, Callable[..., Task]] = {"digits": Digits}


def get_task(name: str, **options: Any) -> Task:
    """The task `name`, made with `options`. Raises: UsageError listing the names, or the task's own for an option."""
    if name not in TASKS:
        near = get_close_matches(name, TASKS, 1)
        raise UsageError(
            f"there is no task {name!r}{f': did you mean {near[0]!r}?' if near else ''}; tasks: {', '.join(TASKS)}"
        )
    try:
        return TASKS[name](**options)
    except TypeError as error:
        raise UsageError(f"task {name!r}: {error}") from error
