"""Everything the documentation shows is run: Python blocks are executed, command lines are parsed."""

from __future__ import annotations

import re
import shlex
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers.readme import FENCE, blocks

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = re.compile(r"<!-- needs: ([\w, ]+) -->\n$")  # right before a block: packages without which it is left out
SHELL = {"sh", "bash", "shell", "console"}
PLACEHOLDERS = {"DIR": "out", "RUN": "runs/x", "FILE": "model.onnx"}




def needs(page: Path, line: int) -> list[str]:
    """The packages that the block beginning at a line asks for and that are not installed."""
    found = NEEDS.search(above(page, line))
    return [name for name in re.findall(r"\w+", found[1]) if find_spec(name) is None] if found else []


def above(page: Path, line: int) -> str:
    """The text above the fence of the block whose first line is given."""
    return "".join(page.read_text().splitlines(keepends=True)[: line - 2])


def commands(text: str) -> list[list[str]]:
    """The arguments of every `lsquant ...` line of a shell block; `$ ` prompts, comments and `\\` are understood."""
    joined = text.replace("\\\n", " ")
    lines = [shlex.split(line.removeprefix("$ "), comments=True) for line in joined.splitlines()]
    return [[PLACEHOLDERS.get(word, word) for word in words[1:]] for words in lines if words[:1] == ["lsquant"]]


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")  # torch.compile's own affair
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, {"python"})], ids=ids)
def test_python_blocks_run(page, in_tmp):
    """The blocks of a page share one namespace, in order, in a working directory with nothing but results/.

    Blocks that need a package that is missing are left out; the test then runs the others and says "skipped".
    """
    Path("results").symlink_to(ROOT / "results")
    space: dict = {"__name__": "__main__"}
    left_out = []
    for line, text in blocks(page, {"python"}):
        if missing := needs(page, line):
            left_out.append(f"line {line} without {', '.join(missing)}")
            continue
        with warnings.catch_warnings():
            if NEEDS.search(above(page, line)):
                warnings.simplefilter("ignore")  # other packages' own affairs
            # the line numbers of a traceback are those of the page
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), space)
    if left_out:
        pytest.skip(f"all other blocks ran; left out: {'; '.join(left_out)}")


SHOWN = [(p, line, c) for p in PAGES for line, text in blocks(p, SHELL) for c in commands(text)]


@pytest.mark.parametrize("arguments", [pytest.param(c, id=f"{ids(p)}:{line}: {' '.join(c)}") for p, line, c in SHOWN])
def test_command_lines_parse(arguments):
    from lsquant.cli.main import parser

    parser().parse_args(arguments)


def test_command_lines_are_found():
    text = "$ lsquant train digits --bits 2 \\\n    --out RUN   # a comment\nmake demo\nlsquant env\n"
    assert commands(text) == [["train", "digits", "--bits", "2", "--out", "runs/x"], ["env"]]
    assert {c[0] for page, _, c in SHOWN if page.name == "command-line.md"} >= {"train", "eval", "export", "verify"}


def test_make_targets_exist():
    """Every `make x` that a page shows is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for line, text in blocks(page, SHELL):
            for name in re.findall(r"^(?:\$ )?make ([a-z-]+)", text, re.MULTILINE):
                assert name in targets, f"{ids(page)}:{line}: make {name}"


def test_links_lead_somewhere():
    """Relative links and pictures of every page exist; links to a heading name one."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
            path, _, anchor = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{ids(page)}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{ids(page)}: {target}"


def test_equation_numbers_agree():
    """The numbers (M1) .. that the reference cites are those of docs/mathematics.md, all of them."""
    documented = re.findall(r"^\*\*\((M\d+)\)", (ROOT / "docs" / "mathematics.md").read_text(), re.MULTILINE)
    assert sorted(documented, key=lambda name: int(name[1:])) == [f"M{n}" for n in range(1, len(documented) + 1)]
    cited = set(re.findall(r"\b(M\d+)\b", (ROOT / "src" / "lsquant" / "reference.py").read_text()))
    assert cited <= set(documented)


def test_functions_named_in_the_mathematics_exist():
    from lsquant import reference

    text = (ROOT / "docs" / "mathematics.md").read_text()
    names = re.findall(r"`lsquant\.reference\.(\w+)", text)
    assert len(names) >= 10
    for name in names:
        assert callable(getattr(reference, name)), name
