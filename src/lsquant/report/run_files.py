"""Read the files of a run directory for the report, whatever is missing or damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lsquant._util.entry import LARGEST_TOML, Entry, parse_toml, read_json, read_text, read_toml
from lsquant._util.errors import DamagedFile, MissingFile
from lsquant.report.values import short
from lsquant.runs.log_reader import LOGGED, finite, latest, log_rows, quantizers_of, read_metrics
from lsquant.verification.verdict import LEVELS

_FILES = ("config.toml", "recipe.toml", "env.json", "log.jsonl", "metrics.json", "model.safetensors")


def run_files(folder: Path) -> dict[str, Any]:
    """Return what the files of a run directory hold.

    name, path, config, recipe (text), environment, metrics, verdicts
    comparison: what `lsquant compare` found, None where it was not run
    files: (name, bytes) of the model and of what was exported
    log, history, last: `curves`, `histories` and `latest` of the log
    missing: in words, every file that does not exist or cannot be read

    Raises: MissingFile where nothing is a run's.
    """
    if not any((folder / name).exists() for name in _FILES):
        raise MissingFile(f"{folder} is no run directory: it has no config.toml")
    missing: list[str] = []
    config = _found(folder / "config.toml", missing, _config)
    recipe = _text(folder / "recipe.toml", missing)
    metrics = _found(folder / "metrics.json", missing, read_metrics)
    env = _found(folder / "env.json", missing, _environment)
    rows = log_rows(folder / "log.jsonl", missing)
    verdicts = [v for f in sorted(folder.glob("export/*.verdict.json")) if (v := _found(f, missing, read_verdict))]
    compared = folder / "export" / "compare.json"
    comparison = _found(compared, missing, read_comparison) if compared.exists() else {}
    patterns = ("model.safetensors", "export/*.onnx", "export/*.safetensors", "export/*/model.safetensors")
    found = [f for pattern in patterns for f in sorted(folder.glob(pattern))]
    return {
        "name": folder.resolve().name,
        "path": str(folder),
        "config": config,
        "recipe": recipe,
        "environment": env,
        "metrics": metrics,
        "verdicts": verdicts,
        "comparison": comparison or None,
        "files": [[str(f.relative_to(folder)), f.stat().st_size] for f in found],
        "log": curves(rows),
        "history": histories(rows),
        "last": latest(rows),
        "missing": missing,
    }


def _found(path: Path, missing: list[str], read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``read`` gives; append to `missing` that the file does not exist or is damaged."""
    try:
        return read(path)
    except MissingFile:
        missing.append(f"{path.name} does not exist")
    except DamagedFile as error:
        missing.append(str(error).replace(str(path), path.name))
    return {}


def _environment(path: Path) -> dict[str, Any]:
    return {name: entry.value for name, entry in read_json(path).table().items()}


def _config(path: Path) -> dict[str, Any]:
    document = read_toml(path)
    found = document.table()
    if "task" in found:
        found["task"].text()
    if "settings" in found:
        found["settings"].table()
    return document.value


def _text(path: Path, missing: list[str]) -> str:
    """Return the recipe as it is written; append to `missing` that it does not exist or is no TOML."""
    found = ""

    def read(path: Path) -> dict[str, Any]:
        nonlocal found
        found = read_text(path, LARGEST_TOML)
        return parse_toml(found, str(path)).value

    before = len(missing)
    if not _found(path, missing, read) and len(missing) == before:
        missing.append(f"{path.name} is empty")
    return found


def read_verdict(path: Path) -> dict[str, Any]:
    """Return a verdict, as ``Verdict.to_dict`` gave it.  Raises: MissingFile; DamagedFile naming file and key."""
    document = read_json(path)
    _check_verdict(document)
    return document.value


def read_comparison(path: Path) -> dict[str, Any]:
    """Return what ``Comparison.to_dict`` gave.  Raises: MissingFile; DamagedFile naming file and key."""
    document = read_json(path)
    found = document.parts("rows", "batch_sizes", "samples", "threads", "machine", "advice")
    for name in ("machine", "advice"):
        found[name].text()
    for name in ("samples", "threads"):
        found[name].integer(0, 2**63)
    for size in found["batch_sizes"].items(100):
        size.integer(1, 2**63)
    for row in found["rows"].items(100):
        parts = row.parts("name", "bytes", "latency", "ratio", "metrics", "level", "reason")
        for name in ("name", "reason"):
            parts[name].text()
        if parts["bytes"].value is not None:
            parts["bytes"].integer(0, 2**63)
        if parts["level"].value is not None:
            parts["level"].choice(LEVELS)
        for times in parts["latency"].table(100).values():
            for entry in times.parts("p20", "p50", "p80").values():
                entry.number(0.0)
        for name in ("ratio", "metrics"):
            for entry in parts[name].table(100).values():
                if entry.value is not None:
                    entry.number()
    return document.value


def _check_verdict(entry: Entry, inside: bool = False) -> None:
    found = entry.parts("level", "profile", "runtime")
    found["level"].choice(LEVELS)
    for name in {"path", "profile", "runtime"} & found.keys():
        found[name].text()
    for name in {"layers", "batches", "samples"} & found.keys():
        found[name].integer(0, 2**63)
    if "session" in found:
        found["session"].text_table()
    for check in found["checks"].items(1000) if "checks" in found else ():
        facts = check.parts("level", "what", "compared", "mismatches", "largest", "worst", "failing", "parts")
        facts["level"].choice(LEVELS)
        for name in ("what", "worst"):
            facts[name].text()
        for name in ("compared", "mismatches", "failing", "parts"):
            facts[name].integer(0, 2**63)
        if facts["largest"].value is not None:
            facts["largest"].number(0.0)
    if "plain" in found and found["plain"].value is not None:
        entry.require(not inside, "a verdict within a verdict within a verdict")
        _check_verdict(found["plain"], inside=True)


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
