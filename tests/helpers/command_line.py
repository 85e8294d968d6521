"""The command line as tests call it, and one tiny run of which every command was called."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lsquant.cli import main

TINY = ["--float-epochs", "2", "--epochs", "1", "--batch-size", "80", "--threads", "1"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def run(*arguments: str | Path) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    assert "\x1b" not in out.getvalue() + err.getvalue()
    return Result(code, out.getvalue(), err.getvalue())


def refused(code: int, says: str, *arguments: str | Path) -> None:
    result = run(*arguments)
    assert result.code == code, result
    assert result.out == ""
    assert re.search(says, result.err), result.err
    assert "Traceback" not in result.err


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    """The whole line, once: the run directory and what each command gave.  Read only."""
    path = tmp_path_factory.mktemp("runs") / "digits-w2a2"
    results = {"train": run("train", "digits", "--bits", "2", "--out", path, *TINY)}
    for name, *options in (
        ("eval",), ("eval json", "--json"), ("export",), ("verify", "--json"), ("export qdq", "--profile", "qdq"),
        ("verify qdq", "--profile", "qdq"), ("compare", "--json", "--repeats", "7"),
        ("report",), ("report json", "--json"),
    ):  # fmt: skip
        results[name] = run(name.split()[0], path, *options)
    return path, results
