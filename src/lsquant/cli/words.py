"""How results, findings and files are named and printed on stdout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from lsquant.diagnostics import Finding
from lsquant.diagnostics.findings import SEVERITIES

VECTORS = 4  # samples of --vectors
SHOWN = 3  # findings of one code that are shown in full

_NAMES = {
    "float": "float32",
    "teacher": "teacher, float32",
    "rounded": "rounded, not trained",
    "start": "as it starts",
    "raw": "trained, as the optimizer left it",
    "lsq": "trained with learned steps",
    "folded": "integer-only, not trained in this form",
    "fused": "integer-only",
}


def results(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (key, what it is) of the results in a metrics.json; only what is there."""
    return [(key, name) for key, name in _NAMES.items() if isinstance(metrics.get(key), dict)]


def measured(metrics: Mapping[str, float | None]) -> str:
    """Format the numbers of one result."""
    return ", ".join(f"{name} {measure(name, value)}" for name, value in metrics.items())


def measure(name: str, value: float | None) -> str:
    """Format a number of a task's metric of that name; None stands for one that was not finite."""
    if value is None:
        return "not finite"
    return f"{value:.2f} %" if name == "accuracy" else f"{value:.4f}"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Format two aligned columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def counted(findings: Sequence[Finding]) -> dict[str, int]:
    """Return how many findings there are by severity: {"errors": ..., ...}."""
    return {f"{severity}s": sum(f.severity == severity for f in findings) for severity in SEVERITIES}


def listed(findings: Sequence[Finding]) -> str:
    """Format findings: of many of one code SHOWN in full, of the others where they are; then how many."""
    if not findings:
        return "no findings"
    lines = []
    for code, number in Counter(f.code for f in findings).items():
        alike = [f for f in findings if f.code == code]
        lines += [str(f) for f in islice(alike, SHOWN)]
        if number > SHOWN:
            lines.append(f"    and {number - SHOWN} more [{code}]: {', '.join(f.where for f in alike[SHOWN:])}")
    lines.append(", ".join(f"{n} {name if n != 1 else name[:-1]}" for name, n in counted(findings).items()))
    return "\n".join(lines)
