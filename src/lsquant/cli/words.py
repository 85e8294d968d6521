"""How results are said on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = {
    "float": "float32",
    "teacher": "teacher, float32",
    "rounded": "rounded, not trained",
    "start": "as it starts",
    "raw": "trained, as the optimizer left it",
    "lsq": "trained with learned steps",
}


def results(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, what it is) of the results in a metrics.json; only what is there."""
    return [(key, name) for key, name in _NAMES.items() if isinstance(metrics.get(key), dict)]


def measured(metrics: Mapping[str, float]) -> str:
    """The numbers of one result."""
    return ", ".join(f"{name} {measure(name, value)}" for name, value in metrics.items())


def measure(name: str, value: float) -> str:
    """A number as the task's metric of that name is said."""
    return f"{value:.2f} %" if name == "accuracy" else f"{value:.4f}"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
