"""Read the files of a run directory for the report, whatever is missing or damaged."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lsquant._util.errors import DamagedFile, MissingFile
from lsquant._util.files import read_json
from lsquant.report.values import short
from lsquant.runs.log_reader import LOGGED, finite, latest, log_rows, quantizers_of

_FILES = ("config.toml", "recipe.toml", "env.json", "log.jsonl", "metrics.json", "model.safetensors")


def run_files(folder: Path) -> dict[str, Any]:
    """Return what the files of a run directory hold.

    name, path, config, recipe (text), environment, metrics, verdicts
    files: (name, bytes) of the model and of what was exported
    log, history, last: `curves`, `histories` and `latest` of the log
    missing: in words, every file that does not exist or cannot be read

    Raises: MissingFile where nothing is a run's.
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
    """Return the JSON object in a file; append to `missing` that it does not exist or is damaged."""
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


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the curves of a log.

    x: epochs since the start of all phases (iterations, in a log without epochs)
    phase: of each row
    series: every number of the rows by its name, None where a row lacks it
    """
    unit = "epoch" if all("epoch" in row for row in rows) else "iteration"
    phases = [str(row.get("phase", "")) for row in rows]
    x: list[float] = []
    before = last = 0.0  # x where the present phase began, and within it
    for i, row in enumerate(rows):
        if i and phases[i] != phases[i - 1]:
            before += last
        last = finite(row.get(unit)) or 0.0
        x.append(before + last)
    names = dict.fromkeys(k for row in rows for k, v in row.items() if finite(v) is not None)
    series = {name: _line(rows, name) for name in names if name != unit}
    return {"unit": unit, "x": x, "phase": phases, "series": series}


def histories(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """Return by quantizer each of LOGGED that was logged, a value a row of the log, None where a row lacks it."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for name in dict.fromkeys(name for row in rows for name in quantizers_of(row)):
        mine = [facts if isinstance(facts := quantizers_of(row).get(name), dict) else {} for row in rows]
        for key in LOGGED:
            line = _line(mine, key, digits=4)
            if any(value is not None for value in line):
                found.setdefault(name, {})[key] = line
    return found


def _line(rows: Sequence[Mapping[str, Any]], key: str, **how: int) -> list[float | None]:
    """Return the numbers of that name, shortened, a value a row."""
    numbers = [finite(row.get(key)) for row in rows]
    return [None if number is None else short(number, **how) for number in numbers]


def from_log(last: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a page without the model: the quantizers that the log has."""
    rows = []
    for name in last:
        layer, _, end = name.rpartition(".")
        kind = {"weight_quantizer": "weight", "input_quantizer": "input"}.get(end, "alone")
        rows.append(
            {"name": name, "layer": name if kind == "alone" else layer, "kind": kind, "views": [], "damage": ""}
        )
    return rows


def complete(rows: list[dict[str, Any]], last: Mapping[str, Mapping[str, float]]) -> None:
    """Fill in from the log what the model does not hold: R, oscillation, guards and, without a model, the step."""
    for row in rows:
        mine = last.get(row["name"], {})
        for key, logged in (("balance", "R"), ("oscillation", "oscillation"), ("step", "step")):
            if row.get(key) is None:
                row[key] = mine.get(logged)
        row["guarded"] = row.get("guarded") or mine.get("guarded", 0)
