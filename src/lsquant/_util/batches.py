"""How a batch becomes the inputs of a model: the same in calibrate, check, verify, report and evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

from lsquant._util.errors import UsageError

T = TypeVar("T")
Forward = Callable[[nn.Module, Any], Any]


def model_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) for the model: a mapping gives keywords, a tuple or list its first element.

    Raises: UsageError for an empty tuple or list and for any other type.

    >>> model_inputs({"ids": 1})
    ((), {'ids': 1})
    """
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {str(key): value for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise UsageError("an empty batch: a tuple or list must have the model's input as its first element")
        return (batch[0],), {}
    raise UsageError(
        f"a batch of type {type(batch).__name__} is neither a tensor, a tuple, a list nor a mapping: "
        "pass forward=lambda model, batch: ..."
    )


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a module was called with first, by position or by any keyword, as forward hooks see it."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def observing_inputs(observers: Iterable[tuple[nn.Module, Callable[[Any], object]]]) -> Iterator[None]:
    """Call functions with the first input of modules, before each of their forward passes inside the ``with`` block.

    observers: (module, function) pairs; the first input is the first positional argument, or the first keyword's.
    """

    def hook_for(observe: Callable[[Any], object]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observe(first_input(args, kwargs))

        return hook

    hooks = []
    try:
        for module, observe in observers:
            hooks.append(module.register_forward_pre_hook(hook_for(observe), with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel or DistributedDataParallel; any other model itself."""
    return model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else model


def run_batch(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Run the model on one batch; ``forward(model, batch)``, if given, replaces the rule of ``model_inputs``."""
    if forward is not None:
        return forward(model, batch)
    args, kwargs = model_inputs(batch)
    return model(*args, **kwargs)


def take(batches: Iterable[T], max_batches: int | None) -> Iterator[T]:
    """Yield the first ``max_batches`` batches (None: all), without asking for one more than that.

    Raises: UsageError if ``batches`` is a bare tensor or mapping, or has no batch at all.
    """
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise UsageError(f"batches is a {type(batches).__name__}, not an iterable of batches: pass [batch]")
    if max_batches is not None and max_batches < 1:
        raise UsageError(f"max_batches must be at least 1, not {max_batches}")
    empty = True
    for batch in islice(batches, max_batches):
        empty = False
        yield batch
    if empty:
        raise UsageError("no batches were given: the iterable is empty (a generator can be used only once)")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Set eval mode without gradients inside the ``with`` block; the mode of every module is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode
