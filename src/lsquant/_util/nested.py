"""Tensors in nested tuples, lists and mappings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def map_tensors(value: Any, change: Callable[[Tensor], Any], otherwise: Callable[[Any], Any] = lambda v: v) -> Any:
    """Rebuild tuples, lists and mappings with every tensor changed, in order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(v, change, otherwise) for v in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, Mapping):
        return {key: map_tensors(v, change, otherwise) for key, v in value.items()}
    return otherwise(value)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and mappings, in order."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found
