"""What traced code calls besides the block's own functions: checks of what tracing took for granted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from lsquant._util.errors import UsageError


def expect(found: Any, traced: Any, what: str) -> None:
    """Raise UsageError where a traced block meets another value than that with which it was traced.

    found: the value in this call.
    traced: None, a number, a string or a boolean: the value in the example.
    what: the block, the place in its file, and what depends on the value.
    """
    if isinstance(found, fx.Proxy) or (found is traced):  # a Proxy: plain torch.fx traces the traced code
        return
    same_kind = traced is not None and isinstance(found, type(traced)) or isinstance(traced, (int, float))
    if not same_kind or found != traced:
        spoken = repr(found) if isinstance(found, (int, float, str, type(None))) else f"a {type(found).__name__}"
        raise UsageError(
            f"{what}: this is {spoken}, but was {traced!r} in the example that lsquant.trace was given; "
            "trace a fresh model with such inputs, or write this block's joins by hand (lsquant.nn.Add(), ...)"
        )


def expect_some(found: Any, what: str) -> None:
    """Raise UsageError where an argument is None that the example gave."""
    if found is None:
        raise UsageError(
            f"{what}: this is None, but was given in the example that lsquant.trace was given; trace a fresh model "
            "with such inputs, or write this block's joins by hand (lsquant.nn.Add(), ...)"
        )


def keys(mapping: Mapping[Any, Any]) -> str:
    """The keys of a mapping as one string, for ``expect``."""
    return ",".join(sorted(map(str, mapping)))
