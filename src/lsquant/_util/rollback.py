"""All or nothing: where something raises, modules are put back as they were, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_CONTAINERS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
"""The attributes in which a module keeps parameters, buffers, children and hooks."""


@contextmanager
def unchanged_on_error(modules: Iterable[nn.Module], *, values: bool = True) -> Iterator[None]:
    """Put these modules back as they were where the ``with`` block raises anything, a KeyboardInterrupt included.

    Class, attributes, children, hooks, and the values of parameters and buffers are restored; objects stay the same.
    Values are kept in main memory meanwhile.  What a tensor on the meta device has is not kept, for it has no values.

    modules: those that the block may change; those that it adds go with the attribute that holds them.
    values: False where the block does not change the values of their parameters: these are then not kept.  Buffers are,
        for a forward pass may write to them, in eval mode too (counters, caches).
    """
    memory = _Memory(list(modules), values)
    try:
        yield
    except BaseException:
        while True:  # a second Ctrl-C does not leave half of it
            try:
                memory.restore()
                break
            except KeyboardInterrupt:
                continue
        raise


class _Memory:
    """What modules are now."""

    def __init__(self, modules: list[nn.Module], values: bool) -> None:
        self.modules = [(m, type(m), dict(vars(m)), _contents(m)) for m in modules]
        tensors: dict[int, Tensor] = {}
        for module in modules:
            parameters = module._parameters.values() if values else ()
            for t in (*parameters, *module._buffers.values()):
                if t is not None and _has_values(t):
                    tensors[id(t)] = t
        self.values = [(t, _copy(t)) for t in tensors.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; may be called again."""
        for module, kind, attributes, contents in self.modules:
            if type(module) is not kind:
                module.__class__ = kind
            now = vars(module)
            now.clear()
            now.update(attributes)
            for name, content in contents.items():
                container = attributes[name]
                container.clear()
                container.update(content)
        for t, value in self.values:
            t.copy_(value)


def _contents(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name].copy() for name in _CONTAINERS if name in vars(module)}


def _has_values(t: Tensor) -> bool:
    """Tell whether a tensor has values, and can be written to: not where elements share memory."""
    if t.is_meta or is_lazy(t):
        return False
    return t.layout != torch.strided or all(n < 2 or stride for n, stride in zip(t.shape, t.stride(), strict=True))


def _copy(t: Tensor) -> Tensor:
    """Return a copy in main memory; of a tensor of another class, such as a distributed one, where it is."""
    with torch.no_grad():
        plain = type(t) in (Tensor, nn.Parameter, nn.Buffer)
        return t.detach().to("cpu", copy=True) if plain else t.detach().clone()
