"""What a run changes besides tensors, attributes of modules and Python's random numbers: put back, or found out."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from lsquant.tracing.places import Untraceable

_CONTAINERS = (dict, OrderedDict, list, set)


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Give a module's attributes the values that they had; containers stay the same objects."""
    for name in set(now) - set(before) - {"training"}:
        del now[name]
    for name, value in before.items():
        if type(value) in _CONTAINERS and type(now.get(name)) is type(value):
            now[name].clear()
            (now[name].extend if isinstance(value, list) else now[name].update)(value)
        else:
            now[name] = value


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module; dictionaries, lists and sets as copies."""
    return {k: v.copy() if type(v) in _CONTAINERS else v for k, v in vars(module).items() if k != "training"}


def _drawn() -> tuple[Any, ...]:
    """Say how far the generators of Python and NumPy are."""
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002  (the one that all share)
    return random.getstate(), position, keys.tobytes() if isinstance(keys, np.ndarray) else keys


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Put back the attributes of all modules in a model, and the random generators of Python and NumPy."""
    attributes = [(module, _attributes(module)) for module in model.modules()]
    generators = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        for module, before in attributes:
            _restore(vars(module), before)


@contextmanager
def state_untouched(block: nn.Module) -> Iterator[None]:
    """Raise Untraceable where a forward sets an attribute, or draws random numbers other than torch's."""
    attributes = [(module, _attributes(module)) for module in block.modules()]
    drawn = _drawn()
    yield
    if _drawn() != drawn:
        raise Untraceable("random numbers of Python or NumPy decide what its forward does; use torch.rand")
    for module, before in attributes:
        for name in _different(before, _attributes(module)):
            owner = "" if module is block else f" of a {type(module).__name__}"
            raise Untraceable(f"its forward sets {name!r}{owner}")


def _different(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return list(a) == list(b) and all(a[k] is b[k] for k in a)
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
        return a == b if isinstance(a, set) and isinstance(b, set) else a is b

    found = []
    for name in [*before, *(name for name in after if name not in before)]:
        one, two = before.get(name), after.get(name)
        if name in before and name in after and same(one, two):
            continue
        inside = name in ("_buffers", "_parameters", "_modules") and isinstance(one, dict) and isinstance(two, dict)
        found += _different(one, two) if inside else [name]  # type: ignore[arg-type]
    return found
