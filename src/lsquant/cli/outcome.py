"""What a command returns."""

from __future__ import annotations

from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """Hold the result of a command.

    result: what --json prints
    text: what is printed without it
    good: whether it is as required; if not, the exit code is 1
    """

    result: dict[str, Any]
    text: str
    good: bool = True
