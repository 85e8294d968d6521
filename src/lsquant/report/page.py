"""From dataclasses to one self-contained HTML page.  Rendering only; nothing is measured here."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lsquant._util.batches import Forward
from lsquant._util.files import atomic_write_text
from lsquant.convert import resolved_recipe
from lsquant.diagnostics import QuantizerFacts, collect
from lsquant.diagnostics.environment import environment

Rows = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Report:
    """What a page shows.  Everything but the quantizers may be empty and is then left out.

    results: (what, number in words).  verdicts: texts.  files: (name, bytes).  commands: to reproduce.
    """

    title: str
    quantizers: Sequence[QuantizerFacts]
    recipe: str = ""
    results: Rows = ()
    verdicts: Sequence[str] = ()
    files: Rows = ()
    commands: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    missing: Sequence[str] = ()


def write_report(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Any] | None = None,
    *,
    max_batches: int | None = 32,
    forward: Forward | None = None,
    title: str = "lsquant report",
) -> None:
    """Write a self-contained HTML page about a model's quantizers: bits, step, R, clip rates, levels used, SQNR, size.

    batches: as for ``calibrate``; without them the page has the weights only.  R is shown where the parameters hold
    gradients (call it after ``backward``).  Raises: UsageError for a step that is not set.
    """
    facts = collect(model, batches, max_batches=max_batches, forward=forward)
    recipe = resolved_recipe(model).to_toml()
    write_page(Report(title, facts, recipe, environment=environment()), path)


def write_page(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page aside and rename it."""
    atomic_write_text(path, render(report))


def with_balance(facts: Sequence[QuantizerFacts], balances: Mapping[str, float | None]) -> list[QuantizerFacts]:
    """The facts with R taken from elsewhere (a run's log) where they have none."""
    return [f if f.balance is not None else replace(f, balance=balances.get(f.name)) for f in facts]


def render(report: Report) -> str:
    """The page as text."""
    title = html.escape(report.title)
    parts = [f"<h1>{title}</h1>"]
    if report.missing:
        parts.append(f"<p class=missing>Missing: {html.escape('; '.join(report.missing))}</p>")
    if report.results:
        parts += ["<h2>Results</h2>", _table(("", "value"), report.results)]
    if report.verdicts:
        parts.append("<h2>Exported files against the trained model</h2>")
        parts += [f"<pre>{html.escape(text)}</pre>" for text in report.verdicts]
    parts += ["<h2>Quantizers</h2>", _LEGEND, _table(_COLUMNS, [_row(f) for f in report.quantizers])]
    parts += ["<h2>Size of the weights</h2>", _sizes(report.quantizers)]
    if report.files:
        parts += ["<h2>Files</h2>", _table(("file", "bytes"), [(name, f"{size:,}") for name, size in report.files])]
    for heading, text in (
        ("Commands", "\n".join(report.commands)),
        ("Recipe", report.recipe),
        ("Environment", "\n".join(f"{key}: {_plain(value)}" for key, value in report.environment.items())),
    ):
        if text:
            parts.append(f"<h2>{heading}</h2>\n<pre>{html.escape(text)}</pre>")
    return _PAGE.format(title=title, body="\n".join(parts))


_COLUMNS = (
    "layer", "what", "bits", "granularity", "step", "initial step", "R", "clipped low", "clipped high", "levels used",
    "entropy", "SQNR dB", "guarded",
)  # fmt: skip

_LEGEND = """<p>step: the guarded step (median, and range where there are several). R: relative size of the step's
gradient, |dL/ds|/s over ||dL/dw||/||w||, at the end of training. clipped: share of the values beyond the lowest and
highest level. levels used: codes that occur, of those there are. SQNR: signal to quantization noise.</p>"""


def _row(f: QuantizerFacts) -> tuple[str, ...]:
    step = _number(f.step) if f.steps == 1 else f"{_number(f.step)} ({_number(f.step_min)} to {_number(f.step_max)})"
    kind = f.spec.split(", ", 1)[1]
    return (
        f.layer or "(root)",
        f.kind,
        str(f.bits),
        kind,
        step,
        _number(f.initial_step),
        "" if f.balance is None else _number(f.balance),
        f"{f.clip_low:.2%}",
        f"{f.clip_high:.2%}",
        f"{f.levels_used} of {f.levels}",
        f"{f.entropy:.2f}",
        _number(f.sqnr),
        str(f.guarded),
    )


def _sizes(facts: Sequence[QuantizerFacts]) -> str:
    weights = [f for f in facts if f.kind == "weight" and f.size is not None]
    rows = [
        (f.layer or "(root)", f"{f.elements:,}", str(f.bits), f"{4 * f.elements:,}", f"{f.size:,}") for f in weights
    ]
    floats, packed = sum(4 * f.elements for f in weights), sum(f.size or 0 for f in weights)
    rows.append(("all", f"{sum(f.elements for f in weights):,}", "", f"{floats:,}", f"{packed:,}"))
    note = f"<p>Packed codes and steps take {packed / floats:.1%} of the float32 weights.</p>" if floats else ""
    return _table(("layer", "weights", "bits", "bytes in float32", "bytes packed with steps"), rows) + note


def _table(head: Sequence[str], rows: Rows) -> str:
    def cells(row: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"

    body = "\n".join(cells(row, "td") for row in rows)
    return f"<div class=wide><table>\n<thead>{cells(head, 'th')}</thead>\n<tbody>{body}</tbody></table></div>"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "inf" if value > 0 else str(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #8882; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ margin-top: 2rem; font-size: 1.2rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
thead th {{ background: var(--soft); }}
pre {{ background: var(--soft); padding: .7rem; overflow-x: auto; }}
.missing {{ border-left: 4px solid #c60; padding-left: .7rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
