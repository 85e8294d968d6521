"""How a batch becomes the inputs of a model, and which model is meant.

The same in prepare, calibrate, export, check, verify, report and evaluate.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

from lsquant._util.entry import shown
from lsquant._util.errors import ForwardError, LsquantError, UsageError
from lsquant._util.nested import tensors_in

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

    Compiled models run uncompiled, for compiled code may leave hooks out.

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
        with uncompiled():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def uncompiled() -> Any:
    """Run compiled models as they are written inside the ``with`` block: compiled code may leave new hooks out."""
    return torch.compiler.set_stance("force_eager")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel and DistributedDataParallel, in any order of wrapping.

    Any other model is returned itself.
    """
    _require_module(model)
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def trained_model(model: nn.Module) -> nn.Module:
    """Return the model that a fused network was made of; any other model is returned itself.

    For functions about quantizers, which a fused network has, and does not run.
    """
    place = getattr(type(model), "TRAINED", None)
    return model if place is None else getattr(model, place)


def _require_module(model: Any, head: str = "") -> None:
    if not isinstance(model, nn.Module):
        getattr(model, "named_modules", None)  # what prepare returned says itself what it is
        raise UsageError(f"{head}the model is {shown(model)}, which is no nn.Module")


def _inside(model: Any) -> nn.Module | None:
    if isinstance(model, PARALLEL):
        return model.module
    dynamo: Any = sys.modules.get("torch._dynamo")  # what has not been imported has compiled nothing
    return model._orig_mod if dynamo is not None and isinstance(model, dynamo.OptimizedModule) else None


PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def require_one_process(model: nn.Module, caller: str, remedy: str = "or give .module") -> nn.Module:
    """Return the model inside torch.compile.

    For functions that add, remove or set parameters, of which a parallel wrapper has taken stock before.

    caller: name of the function, for the message.
    remedy: what else can be done.

    Raises: UsageError for a model in DataParallel or DistributedDataParallel.
    """
    _require_module(model, f"{caller}: ")
    inner: Any = model
    while inner is not None:
        if isinstance(inner, PARALLEL):
            raise UsageError(f"{caller}: {caller} the model before it is wrapped in {type(inner).__name__}, {remedy}")
        model, inner = inner, _inside(inner)
    return model


def run_batch(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Run the model on one batch; ``forward(model, batch)``, if given, replaces the rule of ``model_inputs``.

    Raises: UsageError for a batch that the model's forward does not take; ForwardError where that fails.
    """
    if forward is not None:
        if not callable(forward):
            raise UsageError(f"forward={shown(forward)}: give a function of model and batch")
        return forward(model, batch)
    args, kwargs = model_inputs(batch)
    try:
        return model(*args, **kwargs)
    except (LsquantError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        require_arguments(model, batch)
        shapes = ", ".join(str(list(t.shape)) for t in tensors_in((args, kwargs))[:4]) or "no tensor"
        reason = next(iter(str(error).splitlines()), "")
        kind = type(unwrapped(model)).__name__
        raise ForwardError(
            f"the forward pass of {kind} failed on a batch ({shapes}): {type(error).__name__}: {reason}; "
            "give batches of the shape, type and device that it takes"
        ) from error


def require_arguments(model: nn.Module, batch: Any) -> None:
    """Raise a UsageError where the batch does not give what the model's ``forward`` has to be called with."""
    args, kwargs = model_inputs(batch)
    inner = unwrapped(model)
    try:
        signature = inspect.signature(inner.forward)
    except (TypeError, ValueError):  # a forward that is not written in Python
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        taken = "of a tuple or list only the first element is taken, " if isinstance(batch, (tuple, list)) else ""
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        known = [name for name, p in signature.parameters.items() if p.kind not in variadic]
        mapping = isinstance(batch, (tuple, list)) and isinstance(batch[0], Mapping)
        how = "**batch[0]" if mapping else "*batch"
        given = f" with the keys {', '.join(map(repr, kwargs))}" if kwargs else ""
        raise UsageError(
            f"{type(inner).__name__}.forward does not take this batch{given} ({error}): {taken}a mapping gives keyword "
            f"arguments; pass a dict with the keys it takes ({', '.join(known)}), or where possible "
            f"forward=lambda model, batch: model({how})"
        ) from error


def take(batches: Iterable[T], max_batches: int | None) -> Iterator[T]:
    """Yield the first ``max_batches`` batches (None: all), without asking for one more than that.

    Raises: UsageError if ``batches`` is a bare tensor or mapping, cannot be iterated over, or has no batch at all.
    """
    if isinstance(batches, (torch.Tensor, Mapping)) or not hasattr(batches, "__iter__"):
        raise UsageError(f"batches is a {type(batches).__name__}, not an iterable of batches: pass [batch]")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise UsageError(f"batches={shown(batches)}: give a DataLoader, or a list of batches")
    if max_batches is not None and (not hasattr(max_batches, "__index__") or max_batches < 1):
        raise UsageError(f"max_batches={shown(max_batches)}: it must be a whole number, at least 1, or None for all")
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
