"""What the files of a run directory say, whatever is missing or damaged."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lsquant._util.errors import DamagedFile, MissingFile
from lsquant._util.files import read_json
from lsquant.report.values import short

ROWS = 240  # of the log that are drawn; of more, evenly spaced ones
HISTORY = ("step", "step_min", "step_max", "R", "guarded", "clip_rate", "oscillation")
_FILES = ("config.toml", "recipe.toml", "env.json", "log.jsonl", "metrics.json", "model.safetensors")


def run_files(folder: Path) -> dict[str, Any]:
    """config, recipe (text), environment, metrics, verdicts, files (name, bytes), log and history of a run directory.

    missing: in words, every file that is not there or cannot be read.  Raises: MissingFile where nothing is a run's.
    """
    if not any((folder / name).exists() for name in _FILES):
        raise MissingFile(f"{folder} is no run directory: it has no config.toml")
    missing: list[str] = []
    config: dict[str, Any] = {}
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append("config.toml does not exist")
    except ValueError as error:
        missing.append(f"config.toml is not valid TOML: {error}")
    recipe = ""
    try:
        recipe = (folder / "recipe.toml").read_text(encoding="utf-8")
        if not tomllib.loads(recipe):
            missing.append("recipe.toml is empty")
    except FileNotFoundError:
        missing.append("recipe.toml does not exist")
    except ValueError as error:
        missing.append(f"recipe.toml is not valid TOML: {error}")
    metrics, env = _json(folder / "metrics.json", missing), _json(folder / "env.json", missing)
    rows = log_rows(folder / "log.jsonl", missing)
    verdicts = [v for f in sorted(folder.glob("export/*.verdict.json")) if (v := _json(f, missing))]
    patterns = ("model.safetensors", "export/*.onnx", "export/*.safetensors")
    found = [f for pattern in patterns for f in sorted(folder.glob(pattern))]
    return {
        "name": folder.resolve().name,
        "path": str(folder),
        "config": config,
        "recipe": recipe,
        "environment": env,
        "metrics": metrics,
        "verdicts": verdicts,
        "files": [[str(f.relative_to(folder)), f.stat().st_size] for f in found],
        "log": curves(rows),
        "history": histories(rows),
        "last": latest(rows),
        "missing": missing,
    }


def _json(path: Path, missing: list[str]) -> dict[str, Any]:
    """The object in a file; a missing or damaged one is noted."""
    try:
        value = read_json(path)
    except MissingFile:
        missing.append(f"{path.name} does not exist")
        return {}
    except DamagedFile as error:
        missing.append(f"{path.name} {str(error).removeprefix(str(path)).strip()}")
        return {}
    if not isinstance(value, dict):
        missing.append(f"{path.name} holds no JSON object")
        return {}
    return value


def log_rows(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The rows of log.jsonl that can be read, at most ROWS of them; damaged lines are noted."""
    rows, bad = [], []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        missing.append(f"{path.name} does not exist")
        return []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            bad.append(number)
    if bad:
        lines = ", ".join(map(str, bad[:5])) + (" and others" if len(bad) > 5 else "")
        missing.append(f"{path.name}: line {lines} cannot be read")
    if not rows:
        missing.append(f"{path.name} has no rows yet")
    if len(rows) > ROWS:
        rows = [rows[round(i * (len(rows) - 1) / (ROWS - 1))] for i in range(ROWS)]
    return rows


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """x: epochs since the start of all phases (iterations, in a log without epochs); phase: of each row; series: every
    number of the rows by its name, None where a row lacks it."""
    unit = "epoch" if all("epoch" in row for row in rows) else "iteration"
    x, phases, before, last = list[float](), [str(row.get("phase", "")) for row in rows], 0.0, 0.0
    for i, row in enumerate(rows):
        if i and phases[i] != phases[i - 1]:
            before += last
        last = _number(row.get(unit)) or 0.0
        x.append(before + last)
    names = dict.fromkeys(k for row in rows for k, v in row.items() if _number(v) is not None)
    series = {k: [short(v) if (v := _number(row.get(k))) is not None else None for row in rows] for k in names}
    return {"unit": unit, "x": x, "phase": phases, "series": {k: v for k, v in series.items() if k != unit}}


def histories(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """By quantizer: each of HISTORY that was logged, a value a row of the log, None where a row lacks it."""
    facts = [row["quantizers"] if isinstance(row.get("quantizers"), dict) else {} for row in rows]
    found: dict[str, dict[str, list[float | None]]] = {}
    for name in dict.fromkeys(name for row in facts for name in row):
        mine: list[Any] = [row.get(name) if isinstance(row.get(name), dict) else {} for row in facts]
        for key in HISTORY:
            line = [None if (v := _number(f.get(key))) is None else short(v, 4) for f in mine]
            if any(v is not None for v in line):
                found.setdefault(name, {})[key] = line
    return found


def latest(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By quantizer: the last number of each of HISTORY in the log, as it was written."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, facts in row["quantizers"].items() if isinstance(row.get("quantizers"), dict) else ():
            numbers = {key: facts.get(key) for key in HISTORY} if isinstance(facts, dict) else {}
            mine = found.setdefault(name, {})
            mine |= {key: value for key, value in numbers.items() if _number(value) is not None}
    return found


def from_log(last: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for a page without the model: the quantizers that the log knows."""
    rows = []
    for name in last:
        layer, _, end = name.rpartition(".")
        kind = {"weight_quantizer": "weight", "input_quantizer": "input"}.get(end, "alone")
        rows.append(
            {"name": name, "layer": name if kind == "alone" else layer, "kind": kind, "views": [], "damage": ""}
        )
    return rows


def complete(rows: list[dict[str, Any]], last: Mapping[str, Mapping[str, float]]) -> None:
    """Fill in from the log what is not known otherwise: R, oscillation, guards (a loaded model has none) and step."""
    for row in rows:
        mine = last.get(row["name"], {})
        for key, logged in (("balance", "R"), ("oscillation", "oscillation"), ("step", "step")):
            if row.get(key) is None:
                row[key] = mine.get(logged)
        row["guarded"] = row.get("guarded") or mine.get("guarded", 0)


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None
