"""What traced code calls besides the block's own functions: checks of what tracing took for granted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from lsquant._util.errors import UsageError

_REMEDY = (
    "in the example that lsquant.trace was given; trace a fresh model with such inputs, or write this block's joins by "
    "hand (lsquant.nn.Add(), ...)"
)


class Unexpected(UsageError):
    """A traced block met another value than that with which it was traced.  ``block``: its name."""

    def __init__(self, message: str, block: str) -> None:
        super().__init__(message)
        self.block = block

    def __reduce__(self) -> Any:
        return Unexpected, (str(self), self.block)


def expect(found: Any, traced: Any, block: str, what: str) -> None:
    """Raise Unexpected where a traced block meets another value than that with which it was traced.

    found: the value in this call.
    traced: None, a number, a string, a boolean or a tuple of those: the value in the example.
    block: its name.
    what: the block, the place in its file, and what depends on the value.
    """
    if isinstance(found, fx.Proxy) or (found is traced):  # a Proxy: plain torch.fx traces the traced code
        return
    same_kind = (traced is not None and isinstance(found, type(traced))) or isinstance(traced, (int, float))
    if not same_kind or found != traced:
        spoken = repr(found) if isinstance(found, (int, float, str, type(None))) else f"a {type(found).__name__}"
        raise Unexpected(f"{what}: this is {spoken}, but was {traced!r} {_REMEDY}", block)


def expect_some(found: Any, block: str, what: str) -> None:
    """Raise Unexpected where an argument is None that the example gave."""
    if found is None:
        raise Unexpected(f"{what}: this is None, but was a value {_REMEDY}", block)


def keys(mapping: Mapping[Any, Any]) -> str:
    """Return the keys of a mapping as one string, for ``expect``."""
    return ",".join(sorted(map(str, mapping)))
