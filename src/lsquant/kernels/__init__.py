"""Engines: nothing but arithmetic.  One table from name to module."""

from __future__ import annotations

import importlib
from types import ModuleType

ENGINES = {"eager": "lsquant.kernels.eager"}


def engine(name: str = "eager") -> ModuleType:
    """The module of an engine, imported at first use."""
    return importlib.import_module(ENGINES[name])
