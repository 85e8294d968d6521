"""The tables of docs/benchmarks.md from results/bench/*.csv.

    python benchmarks/tables.py [--results DIR] [--page FILE]

What stands between ``<!-- table: NAME -->`` and ``<!-- end of NAME -->`` is replaced, so the command can be repeated.
A table whose CSV file is absent says that it is not measured yet.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lsquant._util.files import atomic_write_text

ROOT = Path(__file__).resolve().parents[1]
NOT_MEASURED = "not measured yet"
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def number(text: str) -> str:
    """Three significant digits, no exponent for large ones."""
    return f"{float(text):.3g}" if float(text) < 999.5 else f"{float(text):,.0f}"


def spread(row: dict[str, str]) -> str:
    return f"{number(row['p50'])} ({number(row['p20'])} to {number(row['p80'])})"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(x) + " |" for x in lines)]


def ratios(rows: Rows) -> list[str]:
    """One line a configuration, one column a contender: the baseline's time, and for the others the ratio to it."""
    baseline = rows[0]["baseline"]
    measured = unique([r["contender"] for r in rows if int(r["repeats"])])
    others = [name for name in measured if name != baseline]
    lines = []
    for configuration in unique([r["configuration"] for r in rows]):
        found = {r["contender"]: r for r in rows if r["configuration"] == configuration}
        there = [found[n] if n in found and int(found[n]["repeats"]) else None for n in others]
        cells = ["" if r is None else f"{float(r['ratio']):.{2 if float(r['ratio']) >= 0.1 else 4}f}" for r in there]
        lines.append([configuration, spread(found[baseline]), *cells])
    return table(["", f"{baseline}, {rows[0]['unit']}", *others], lines)


def phases(rows: Rows) -> list[str]:
    """One line a contender, two columns a phase: value, and ratio to the baseline that is named."""
    text: list[str] = []
    for configuration in unique([r["configuration"] for r in rows]):
        part = [r for r in rows if r["configuration"] == configuration and int(r["repeats"])]
        names, lines = unique([r["phase"] for r in part]), []
        for contender in unique([r["contender"] for r in part]):
            cells = [contender]
            for phase in names:
                row = next(r for r in part if (r["contender"], r["phase"]) == (contender, phase))
                is_base = contender == row["baseline"]
                cells += [spread(row), "1" if is_base else f"{float(row['ratio']):.2f} x {row['baseline']}"]
            lines.append(cells)
        head = [""] + [cell for phase in names for cell in (f"{phase}, {part[0]['unit']}", "ratio")]
        text += [f"{configuration}:", "", *table(head, lines), ""]
    return text[:-1]


def differences(rows: Rows) -> list[str]:
    """What the checks before the measurements found, the largest numbers of each contender; and who was left out."""
    lines = []
    for contender in unique([r["contender"] for r in rows if r["check"]]):
        checks = [r["check"] for r in rows if r["contender"] == contender and int(r["repeats"])]
        found = [[float(n) for n in re.findall(r"([\d.]+)%", check)] for check in checks]
        if found := [pair for pair in found if pair]:
            codes, gradients = (f"{max(column):.3g} %" for column in zip(*found, strict=True))
            lines.append([contender, codes, gradients])
    return table(["", "other codes", "other gradients of x"], lines)


def left_out(rows: Rows) -> list[str]:
    reasons = unique([f"{r['contender']}: {r['check'].removeprefix('left out: ')}" for r in rows
                      if not int(r["repeats"])])  # fmt: skip
    return ["", "Left out: " + "; ".join(reasons) + "."] if reasons else []


def conditions(rows: Rows) -> list[str]:
    """Where and with what the numbers were taken, in one line."""
    row, repeats = rows[0], unique([r["repeats"] for r in rows if int(r["repeats"])])
    counts = unique([r["threads"] for r in rows])
    threads = f"{' or '.join(counts)} thread{'' if counts == ['1'] else 's'}"
    where = f"{row['processor']}, {row['device']}, {threads}"
    return [f"*{where}; p50 (p20 to p80) of {' or '.join(repeats)}; {row['versions']}.*", ""]


def render(name: str, results: Path) -> str:
    """The Markdown of one table."""
    path = results / f"{name.removesuffix('-checks')}.csv"
    rows = read(path) if path.is_file() else []
    if not rows:
        return NOT_MEASURED
    if name == "quantizer-checks":
        return "\n".join(differences(rows))
    body = ratios(rows) if name in ("quantizer", "deploy", "collection") else phases(rows)
    return "\n".join([*conditions(rows), *body, *left_out(rows)])


def replaced(page: str, render: Callable[[str], str]) -> str:
    """The page with every table between its markers replaced; render: gives a table of that name."""
    marker = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
    return marker.sub(lambda m: f"{m[1]}\n{render(m[2])}\n\n{m[3]}", page)


def filled(page: str, results: Path) -> str:
    """The page with the tables of these results."""
    return replaced(page, lambda name: render(name, results))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    a = parser.parse_args(arguments)
    atomic_write_text(a.page, filled(a.page.read_text(encoding="utf-8"), a.results))


if __name__ == "__main__":
    main()
