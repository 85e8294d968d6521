"""Render facts as one self-contained HTML page: the template, styles and scripts of ``assets/`` with the data."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from torch import nn

from lsquant._util.batches import Forward, unwrapped
from lsquant._util.files import atomic_write_text, json_text
from lsquant._version import __version__
from lsquant.diagnostics.environment import environment
from lsquant.report.model_facts import model_facts

STYLES = ("vendor/uPlot.min.css", "page.css")
SCRIPTS = ("vendor/uPlot.iife.min.js", "base.js", "steps.js", "staircase.js", "table.js", "curves.js", "page.js")


def write_report(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Any] | None = None,
    *,
    max_batches: int | None = 32,
    forward: Forward | None = None,
    title: str | None = None,
    verdicts: Iterable[dict[str, Any]] = (),
    comparison: dict[str, Any] | None = None,
) -> None:
    """Write a self-contained HTML page about a model's quantizers.

    The page has bits, step, R, clip rates, levels used, SQNR and size of each quantizer, its staircase over the
    histogram of its values, and the findings of ``check``. R is there where parameters hold gradients (after
    ``backward``).

    batches, forward: as for ``calibrate``; without batches the page has the weights only
    max_batches: the largest number of batches to use; None uses all
    title: of the page; by default the model's class
    verdicts: ``Verdict.to_dict()`` of files that were compared with the model
    comparison: ``Comparison.to_dict()`` of ``lsquant.compare``: the page has its table

    Raises: UsageError for a step that is not set.
    """
    facts = model_facts(model, batches, max_batches=max_batches, forward=forward)
    missing = [] if batches is not None else ["no data was given: the page has the weights' quantizers only"]
    run = {"name": title or type(unwrapped(model)).__name__, "environment": environment(), "missing": missing}
    write_page(title or "lsquant report", [run | {"verdicts": list(verdicts), "comparison": comparison} | facts], path)


def write_page(title: str, runs: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write the page of some runs to a temporary file and rename it."""
    atomic_write_text(path, render(title, runs))


def render(title: str, runs: list[dict[str, Any]]) -> str:
    """Return the page as text. In the data "<" is escaped, so that no text in it can end the script element."""
    data = {"version": __version__, "title": title, "runs": runs}
    parts: Mapping[str, str] = {
        "title": html.escape(title),
        "data": json_text(data).replace("<", "\\u003c"),
        "styles": "\n".join(_asset(name) for name in STYLES),
        "scripts": "\n".join(f"<script>\n{_asset(name)}\n</script>" for name in SCRIPTS),
        "licence": _asset("vendor/uPlot.LICENSE.txt"),
    }
    return re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return files("lsquant.report").joinpath("assets", *name.split("/")).read_text(encoding="utf-8").strip()
