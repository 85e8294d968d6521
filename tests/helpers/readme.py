"""The fenced code blocks of a page."""

from __future__ import annotations

import re
from pathlib import Path

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, languages: set[str]) -> list[tuple[int, str]]:
    """(line, text) of the fenced blocks of a page in one of the languages."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start()) + 2, m[2]) for m in FENCE.finditer(text) if m[1] in languages]
