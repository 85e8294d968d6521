"""``Traced``: what ``trace`` did, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lsquant._util.errors import UsageError


@dataclass(frozen=True)
class TracedBlock:
    """One block: a module with a forward of its own.

    name: in the model; "" for the root.
    kind: its class.
    modules: name within the block of each new module -> what it is, and the file and line of the function.
    left: functions that compute with activations and stay functions.
    renamed: (old key, new key) of parameters that moved into a new module.
    reason: why the block stays as it is; "" where it was traced.
    """

    name: str
    kind: str
    modules: dict[str, str]
    left: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    reason: str = ""


class Traced(tuple[TracedBlock, ...]):
    """What ``trace`` did: a tuple of ``TracedBlock``; prints as a table.  It is no model: trace works in place."""

    @property
    def untraced(self) -> tuple[TracedBlock, ...]:
        """Return the blocks that stay as they are though they use functions."""
        return tuple(row for row in self if row.reason)

    @property
    def modules(self) -> dict[str, str]:
        """Return the full name of each new module -> what it is, and the file and line of the function."""
        return {f"{row.name}.{name}".lstrip("."): what for row in self for name, what in row.modules.items()}

    @property
    def renamed(self) -> tuple[tuple[str, str], ...]:
        """Return (old, new) for each key of the state dict that changed."""
        return tuple(pair for row in self for pair in row.renamed)

    def __str__(self) -> str:
        rows = [("block", "type", "new modules", "note")]
        rows += [(r.name or "(root)", r.kind, ", ".join(r.modules), _note(r)) for r in self]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        traced, left = len(self) - len(self.untraced), len(self.untraced)
        summary = f"{_count(traced, 'block')} traced, {_count(len(self.modules), 'module')} inserted"
        if left:
            summary += f", {_count(left, 'block')} left as {'it is' if left == 1 else 'they are'}"
        return "\n".join([*(lines if self else []), summary])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError("trace works in place: go on using the model you passed, not what trace returned")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(nn.Module, name):
            raise AttributeError(name)
        raise UsageError(f"trace works in place: call .{name} on the model you passed, not on what trace returned")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _note(row: TracedBlock) -> str:
    parts = [f"left as it is: {row.reason}"] if row.reason else []
    if row.left:
        parts.append(f"still functions: {', '.join(row.left)}")
    parts += [f"key {old!r} is now {new!r}" for old, new in row.renamed]
    return "; ".join(parts)
