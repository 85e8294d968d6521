"""Modules of benchmarks/ and studies/ imported as scripts do it, and what every CSV row must be."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import lsquant

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

COLUMNS = [
    "workload", "configuration", "phase", "contender", "unit", "p20", "p50", "p80", "repeats", "ratio", "baseline",
    "check", "device", "processor", "threads", "versions",
]  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/ or studies/ as a script there does."""
    for folder in ("studies", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module


def assert_sound(rows: list[dict[str, str]], contenders: set[str], groups: int) -> None:
    assert rows
    for row in rows:
        assert list(row) == COLUMNS
        assert all(row[name] for name in COLUMNS if name != "check"), row
        assert "torch " + torch.__version__ in row["versions"]
        assert "lsquant " + lsquant.__version__ in row["versions"]
        assert row["threads"] == "1"
        if row["repeats"] == "0":
            assert row["check"].startswith("left out: ")
            continue
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]), row
        assert float(row["ratio"]) > 0
        assert row["contender"] != row["baseline"] or float(row["ratio"]) == 1
    assert contenders <= {row["contender"] for row in rows}
    assert len({(row["configuration"], row["phase"]) for row in rows}) == groups
    assert len({(row["configuration"], row["phase"], row["contender"]) for row in rows}) == len(rows)
