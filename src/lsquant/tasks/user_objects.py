"""Load objects of the user's code that are named on the command line: ``package.module:name`` or ``FILE.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from lsquant._util.errors import MissingFile, UsageError


def load_object(where: str) -> Any:
    """Load the object that ``where`` names; modules are searched for in the current folder, too.

    Raises: UsageError for another form, and for a module or name that does not exist (with near names); MissingFile
    for a file that does not exist; whatever the user's module raises.
    """
    place, _, name = where.rpartition(":")
    if not place or not name.isidentifier():
        raise UsageError(f"{where!r}: write package.module:name or FILE.py:name")
    module = _from_file(place) if place.endswith(".py") else _from_name(place, where)
    try:
        return getattr(module, name)
    except AttributeError:
        raise UsageError(f"{where!r}: {place} has no {name!r}{_near(name, dir(module))}") from None


def call(function: Any, where: str) -> Any:
    """Return ``function()``. Raises: UsageError for what cannot be called without arguments."""
    if not callable(function):
        raise UsageError(f"{where!r} is a {type(function).__name__}, not a function without arguments")
    try:
        inspect.signature(function).bind()
    except ValueError:
        pass  # some built-in types have no signature to read
    except TypeError as error:
        raise UsageError(f"{where!r} cannot be called without arguments: {error}") from None
    return function()


def _from_file(place: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        raise MissingFile(f"{place} does not exist{_near(path.name, _names_in(path.parent))}")
    path = path.resolve()
    name = path.stem
    if (known := sys.modules.get(name)) is not None:
        if getattr(known, "__file__", None) == str(path):
            return known  # named twice, for the model and for the data
        name = f"lsquant_own_{name}"
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as if it were run: it may import its neighbours
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_name(place: str, where: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise
        parent, _, last = error.name.rpartition(".")
        found = getattr(sys.modules.get(parent), "__path__", []) if parent else None
        names = [m.name for m in pkgutil.iter_modules(found)]
        raise UsageError(f"{where!r}: there is no module {error.name!r}{_near(last, names)}") from None


def _names_in(folder: Path) -> list[str]:
    return [p.name for p in folder.glob("*.py")] if folder.is_dir() else []


def _near(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, [n for n in names if not n.startswith("__")], 3, 0.6)
    return f"; near names: {', '.join(near)}" if near else ""
