"""Tensors in nested tuples, lists, mappings, dataclasses and namespaces."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

Path = tuple[str | int, ...]
"""Where a tensor is: keys, positions and names of fields, from the outside in."""


def map_tensors(value: Any, change: Callable[[Tensor], Any], otherwise: Callable[[Any], Any] = lambda v: v) -> Any:
    """Rebuild tuples, lists and mappings with every tensor changed, in order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(v, change, otherwise) for v in value]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*parts)
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, Mapping):
        return {key: map_tensors(v, change, otherwise) for key, v in value.items()}
    return otherwise(value)


def replaced(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Return a copy of what ``tensors_in`` looks into, with other tensors in the place of those it finds, in order.

    Containers keep their types: transformers' ModelOutput stays one.
    """
    waiting = iter(tensors)
    return _replaced(value, waiting)


def _replaced(value: Any, waiting: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(waiting)
    parts = [(key, _replaced(part, waiting)) for key, part in _items(value)]
    if isinstance(value, (tuple, list)):
        made = [part for _, part in parts]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if not parts:
        return value
    found = copy.copy(value)
    for key, part in parts:
        if isinstance(value, Mapping):
            found[key] = part
        else:
            object.__setattr__(found, str(key), part)  # of a frozen dataclass, too
    return found


def _items(value: Any) -> list[tuple[Any, Any]]:
    """Return what ``_parts`` gives, with keys as they are."""
    if isinstance(value, Mapping):
        return list(value.items())
    return list(_parts(value))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in whatever ``named_tensors`` looks into, in order."""
    return [tensor for _, tensor in named_tensors(value)]


def named_tensors(value: Any) -> list[tuple[Path, Tensor]]:
    """Return the tensors in tuples, lists, mappings, dataclasses and namespaces, nested at will, with their places.

    transformers' ModelOutput is a mapping.  Whatever else is in between, None for one, is passed over.
    """
    return list(_walk(value, (), ()))


def _walk(value: Any, path: Path, outside: tuple[int, ...]) -> Iterator[tuple[Path, Tensor]]:
    """Yield (path, tensor); outside: the ids of the containers around the value, which may hold itself."""
    if isinstance(value, Tensor):
        yield path, value
    elif id(value) not in outside:
        for key, part in _parts(value):
            yield from _walk(part, (*path, key), (*outside, id(value)))


def _parts(value: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, Mapping):
        return ((str(key), part) for key, part in value.items())
    if isinstance(value, (tuple, list)):
        return iter(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value))
    if isinstance(value, SimpleNamespace):
        return iter(vars(value).items())
    return iter(())
