"""Progress on stderr: one line that is rewritten on a terminal, one line at the end elsewhere. No colour."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TextIO, TypeVar

T = TypeVar("T")
_INTERVAL = 0.1  # seconds between two updates of the line
_BAR = 20  # characters


class ProgressBar(Iterable[T], Generic[T]):
    """Iterate over `items` and show how many are done.

    total: number of items; None if unknown
    label: at the beginning of the line
    quiet: show nothing
    start: items done before
    stream: stderr by default
    """

    def __init__(
        self,
        items: Iterable[T],
        total: int | None = None,
        label: str = "",
        quiet: bool = False,
        *,
        start: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.items, self.label, self.quiet = items, label, quiet
        self.total = len(items) + start if total is None and hasattr(items, "__len__") else total  # pyright: ignore
        self.start = self.done = start
        self.stream = sys.stderr if stream is None else stream
        self._note: str | Callable[[], str] = ""
        self._width = 0

    def note(self, text: str | Callable[[], str]) -> None:
        """Set the text at the end of the line, e.g. "loss 0.12"; a function is called only when the line is shown."""
        self._note = text

    def __iter__(self) -> Iterator[T]:
        live = not self.quiet and self.stream.isatty()
        began = time.monotonic()
        shown = -_INTERVAL
        for item in self.items:
            yield item
            self.done += 1
            elapsed = time.monotonic() - began
            if live and elapsed - shown >= _INTERVAL:
                shown = elapsed
                self._write(self.line(elapsed), end="")
        if not self.quiet:
            self._write(self.line(time.monotonic() - began), end="\n")

    def line(self, elapsed: float) -> str:
        """Format the line for the present state; `elapsed`: seconds since the first item."""
        parts = [self.label] if self.label else []
        if self.total:
            filled = min(_BAR, _BAR * self.done // self.total)
            parts.append(f"[{'#' * filled}{'.' * (_BAR - filled)}] {self.done}/{self.total}")
        else:
            parts.append(str(self.done))
        if elapsed > 0 and self.done > self.start:
            parts.append(f"{(self.done - self.start) / elapsed:.1f}/s")
        note = self._note if isinstance(self._note, str) else self._note()
        return "  ".join([*parts, note] if note else parts)

    def _write(self, text: str, end: str) -> None:
        if self.stream.isatty():
            text, self._width = "\r" + text.ljust(self._width), len(text)
        self.stream.write(text + end)
        self.stream.flush()
        if end:
            self._width = 0


def message(text: str, quiet: bool = False) -> None:
    """Print one line to stderr unless `quiet`."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)
