"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from lsquant._util.errors import MissingExtra


def require(name: str, *, extra: str) -> ModuleType:
    """Import an optional package where it is used.

    name: of the package or module.
    extra: the extra of lsquant that installs it.
    Raises: MissingExtra naming ``pip install lsquant[extra]``.  An ImportError from inside an installed package (a
        broken installation) is passed on as it is.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise MissingExtra(
            f"the package {error.name!r} is needed for this and is not installed: pip install 'lsquant[{extra}]'",
            name=error.name,
        ) from error
