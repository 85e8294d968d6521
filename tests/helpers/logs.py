"""log.jsonl as it is compared: without what depends on the clock."""

from __future__ import annotations

import json
from pathlib import Path

CLOCK = ("seconds", "samples_per_second")


def untimed(log: Path) -> list[dict]:
    """The rows, each of which must have the time it took."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(row.pop(name) >= 0.0 for row in rows for name in CLOCK)
    return rows
