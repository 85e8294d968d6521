"""The tasks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from lsquant._util.errors import UsageError
from lsquant.runs.task import Task
from lsquant.tasks.cifar10 import Cifar10
from lsquant.tasks.digits import Digits
from lsquant.tasks.text import Text
from lsquant.tasks.user_objects import call, load_object

TASKS: dict[str, Callable[..., Task]] = {"digits": Digits, "cifar10": Cifar10, "text": Text}


def get_task(name: str, **options: Any) -> Task:
    """Build the task `name` with `options`; or load a user's own, `FILE.py:task`, which takes none.

    Raises: UsageError listing the names, or the task's options; what the task raises for the value of one.
    """
    if ":" in name:
        _check_options(name, options, ())
        return _user_task(name)
    if name not in TASKS:
        near = get_close_matches(name, TASKS, 1)
        raise UsageError(
            f"there is no task {name!r}{f': did you mean {near[0]!r}?' if near else ''}; tasks: {', '.join(TASKS)}, "
            "or your own as FILE.py:task"
        )
    _check_options(name, options, tuple(inspect.signature(TASKS[name]).parameters))
    return TASKS[name](**options)


def _check_options(name: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    if unknown := [option for option in options if option not in known]:
        takes = f"; it takes {', '.join(known)}" if known else ": it brings its own"
        raise UsageError(f"task {name!r} takes no {', '.join(unknown)}{takes}")


def _user_task(where: str) -> Task:
    """Load a task object, or call a class or function that gives one; `source` is set to where it came from."""
    members = {*Task.__annotations__, *(name for name in vars(Task) if not name.startswith("_"))}
    found = load_object(where)
    if isinstance(found, type) or inspect.isroutine(found):
        found = call(found, where)
    if missing := sorted(name for name in members if not hasattr(found, name)):
        raise UsageError(f"{where!r} is a {type(found).__name__} and no task: it lacks {', '.join(missing)}")
    found.source = where
    return found
