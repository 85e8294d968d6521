"""Read a run's log.jsonl, whatever is missing or damaged; `lsquant.training.Log` writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lsquant._util.entry import parse_json, read_json, without_waiting
from lsquant._util.errors import DamagedFile

ROWS = 240  # of the log that are read; of more, evenly spaced ones
LONGEST = 1 << 24  # characters of a row
MOST_LINES = 1 << 20
LOGGED = ("step", "step_min", "step_max", "R", "guarded", "clip_rate", "oscillation")
"""What a row says about every quantizer."""


def log_rows(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Return the rows that can be read, at most ROWS of them; append damaged lines, in words, to `missing`."""
    rows, damaged = [], []
    try:
        with open(path, "rb", opener=without_waiting) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
                if number > MOST_LINES:
                    damaged.append(number)
                    break
                try:
                    rows.append(_row(line, path.name))
                except DamagedFile:
                    if line.strip():
                        damaged.append(number)
    except OSError:
        missing.append(f"{path.name} does not exist")
        return []
    if damaged:
        lines = ", ".join(map(str, damaged[:5])) + (" and others" if len(damaged) > 5 else "")
        missing.append(f"{path.name}: line {lines} cannot be read")
    if not rows:
        missing.append(f"{path.name} has no rows yet")
    if len(rows) > ROWS:
        rows = [rows[round(i * (len(rows) - 1) / (ROWS - 1))] for i in range(ROWS)]
    return rows


def _row(line: bytes, name: str) -> dict[str, Any]:
    """Return a line as a table.  Raises: DamagedFile."""
    entry = parse_json(line.decode("utf-8", "replace"), name, largest=LONGEST)
    entry.table()
    return entry.value


def read_metrics(path: Path) -> dict[str, Any]:
    """Return the content of a metrics.json: results, each with numbers, None for one that was not finite.

    Raises: MissingFile; DamagedFile naming file and key.
    """
    found = read_json(path).table(100)
    for name, entry in found.items():
        if name == "task":
            entry.text()
        elif name in ("format", "seed"):
            entry.integer(-(2**63), 2**63)
        else:
            for number in entry.table(1000).values():
                if number.value is not None:
                    number.number()
    return {name: entry.value for name, entry in found.items()}


def quantizers_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row says by quantizer; empty where it says nothing."""
    found = row.get("quantizers")
    return found if isinstance(found, dict) else {}


def latest(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return by quantizer the last number of each of LOGGED, as it was written."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, facts in quantizers_of(row).items():
            mine = found.setdefault(name, {})
            for key in LOGGED if isinstance(facts, dict) else ():
                if finite(facts.get(key)) is not None:
                    mine[key] = facts[key]
    return found


def finite(value: Any) -> float | None:
    """Return `value` as a float if it is a finite number, else None; a bool is none."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None
