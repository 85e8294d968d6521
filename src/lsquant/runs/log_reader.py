"""Read a run's log.jsonl, whatever is missing or damaged; `lsquant.training.Log` writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = 240  # of the log that are read; of more, evenly spaced ones
LOGGED = ("step", "step_min", "step_max", "R", "guarded", "clip_rate", "oscillation")
"""What a row says about every quantizer."""


def log_rows(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Return the rows that can be read, at most ROWS of them; append damaged lines, in words, to `missing`."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        missing.append(f"{path.name} does not exist")
        return []
    rows, damaged = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            damaged.append(number)
    if damaged:
        lines = ", ".join(map(str, damaged[:5])) + (" and others" if len(damaged) > 5 else "")
        missing.append(f"{path.name}: line {lines} cannot be read")
    if not rows:
        missing.append(f"{path.name} has no rows yet")
    if len(rows) > ROWS:
        rows = [rows[round(i * (len(rows) - 1) / (ROWS - 1))] for i in range(ROWS)]
    return rows


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
