"""Copies of a trained model: with its hooks, without its graph of gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.errors import UsageError
from lsquant._util.nested import tensors_in
from lsquant.unsupported import spoken_hook

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
"""Where a module keeps what runs before and after its forward pass."""


def copied(model: nn.Module, replaced: Mapping[nn.Module, nn.Module] | None = None) -> Any:
    """Return a deep copy of a model in which some modules are replaced.

    The forward hooks of a replaced module run on its replacement, copied as the others are: what they do to inputs and
    outputs stays what it was.  Tensors that a module keeps from its last forward pass, as the weight of weight_norm,
    are copied without their history.

    replaced: module of the model -> its replacement in the copy.
    Raises: UsageError where Python cannot copy the model.
    """
    try:
        return _copy(model, replaced or {}, {})
    except (TypeError, RuntimeError, AttributeError, NotImplementedError):
        pass
    shared = [hook for module in model.modules() for name in HOOKS for hook in _hooks(module, name)]
    try:
        return _copy(model, replaced or {}, {id(hook): hook for hook in shared})  # a logger with an open file, say
    except (TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise UsageError(f"{type(model).__name__} cannot be copied, {type(error).__name__}: {error}") from error


def _copy(model: nn.Module, replaced: Mapping[nn.Module, nn.Module], memo: dict[int, Any]) -> Any:
    memo |= {id(old): new for old, new in replaced.items()}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    twin = copy.deepcopy(model, memo)
    for old, new in replaced.items():
        for name in HOOKS:
            vars(new)[name] = copy.deepcopy(vars(old)[name], memo)
    return twin


def _hooks(module: nn.Module, name: str) -> list[Any]:
    return [hook for hook in vars(module)[name].values() if callable(hook)]


def drop_observers(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """Remove the forward hooks that change nothing while the model runs, for a graph of what computes.

    Hooks of torch itself, as that of weight_norm, stay.

    run: runs the model.
    Returns: the hooks that change values, which stay, with their modules.
    """
    watched: list[tuple[str, Any, int, _Watched]] = []
    for name, module in model.named_modules():
        for place in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = vars(module)[place]
            for key, hook in hooks.items():
                if not type(hook).__module__.startswith("torch."):
                    hooks[key] = _Watched(hook)
                    watched.append((name, hooks, key, hooks[key]))
    if not watched:
        return []
    try:
        with torch.no_grad():
            run()
    finally:
        for _, hooks, key, watch in watched:
            hooks[key] = watch.hook
    for _, hooks, key, watch in watched:
        if not watch.changes:
            del hooks[key]
    return [f"{spoken_hook(watch.hook)} of {name or '(root)'}" for name, _, _, watch in watched if watch.changes]


class _Watched:
    """A hook, and whether it has written into a value or returned another one."""

    def __init__(self, hook: Any) -> None:
        self.hook, self.changes = hook, False

    def __call__(self, *args: Any) -> Any:
        tensors = tensors_in(args[1:])
        before = [(_writes(t), t.detach().clone()) for t in tensors]
        result = self.hook(*args)
        after = tensors_in(args[1:])  # others where it exchanged some in a container
        self.changes |= result is not None and result is not args[-1]
        self.changes |= [id(t) for t in after] != [id(t) for t in tensors]
        self.changes |= any(_writes(t) != n or not _same(t, b) for t, (n, b) in zip(tensors, before, strict=True))
        return result


def _writes(t: Tensor) -> int:
    """Count the writes into a tensor: one that leaves the values of this run as they are changes others."""
    return 0 if t.is_inference() else t._version


def _same(t: Tensor, before: Tensor) -> bool:
    return t.shape == before.shape and bool(torch.equal(t.nan_to_num(), before.nan_to_num()))
