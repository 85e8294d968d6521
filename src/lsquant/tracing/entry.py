"""``trace``: run the example, plan what each block becomes, exchange them, compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lsquant._util.batches import model_inputs, unwrapped
from lsquant._util.errors import UsageError
from lsquant.tracing import blocks
from lsquant.tracing.example import Call, Run, doubled, equal, output, output_or_none
from lsquant.tracing.guard import Unexpected
from lsquant.tracing.places import Untraceable, spoken
from lsquant.tracing.planning import plan
from lsquant.tracing.result import Traced, TracedBlock

_TOLD = 3
"""How many blocks an error names."""


def trace(model: nn.Module, example_inputs: Any, *, strict: bool = True) -> Traced:
    """Put modules in the place of functions, in the forward of every block of a model, in place.

    ``x + y`` in block ``layer1.0`` becomes ``self.add(x, y)`` with ``layer1.0.add``, an ``lsquant.nn.Add``; so do
    ``torch.cat``, ``F.relu``, pooling, means over space and the like (docs/tracing.md has the table).  Outputs stay
    equal bit for bit.

    model: any nn.Module; parameters, classes (by isinstance), hooks and mode stay.
    example_inputs: one batch (a tensor; a tuple or list, whose first element counts; a mapping).
    strict: whether a block that uses functions and cannot be traced is an error; False: it stays as it is, and its row
        says why.
    Returns: Traced, a row per block.
    Raises: UsageError naming file, line and what to write instead; the model is then unchanged.

    >>> class Residual(nn.Module):
    ...     def forward(self, x):
    ...         return x.relu() + x
    >>> print(lsquant.trace(nn.Sequential(Residual()), torch.ones(2, 3)))
    block  type      new modules  note
    0      Residual  relu, add
    1 block traced, 2 modules inserted
    """
    _check_arguments(model, strict)
    with torch.random.fork_rng(devices=()):
        return _trace(model, example_inputs, strict)


def _trace(model: nn.Module, example_inputs: Any, strict: bool) -> Traced:
    args, kwargs = model_inputs(example_inputs)
    before = Run(model)
    outputs = before.run(args, kwargs)
    twice = doubled(args, kwargs)
    twice_outputs = None if twice is None else output_or_none(model, *twice)
    plans: dict[str, tuple[blocks.Plan, TracedBlock]] = {}
    failures: dict[str, Untraceable] = {}
    for name, call in before.calls.items():
        try:
            if call.functions and (found := plan(name, call, strict)) is not None:
                plans[name] = found
        except Untraceable as error:
            failures[name] = error
    if failures and strict:
        told = [_failure(name, before.calls[name], error) for name, error in list(failures.items())[:_TOLD]]
        if len(failures) > _TOLD:
            told.append(f"{len(failures) - _TOLD} more blocks cannot be traced; strict=False lists all")
        raise UsageError("trace: " + "\n".join(told))

    while True:
        undone = []
        try:
            for one, _ in plans.values():
                undone.append((one, (type(one.block), dict(one.block._parameters))))
                blocks.apply(one)
            _compare(before, outputs, args, kwargs)
            if twice is not None and twice_outputs is not None:
                _compare_doubled(model, twice_outputs, *twice)
            break
        except BaseException as error:
            for one, state in reversed(undone):
                blocks.undo(one, state)
            if not isinstance(error, _Different):
                raise
            if strict or error.block not in plans:
                raise UsageError(f"trace: {error}") from error
            failures[error.block] = Untraceable(str(error))
            del plans[error.block]
    rows = [row for _, row in plans.values()]
    rows += [_untraced(name, before.calls[name], error) for name, error in failures.items()]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return Traced(sorted(rows, key=lambda row: order[row.name]))


def _check_arguments(model: Any, strict: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"trace: the model is a {type(model).__name__}, not an nn.Module")
    if not isinstance(strict, bool):
        raise UsageError(f"trace: strict={strict!r}; use True or False")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "trace: the model is a TorchScript module, which has no Python forward; trace the model it came from"
        )
    if any(nn.parameter.is_lazy(p) for p in (*model.parameters(), *model.buffers())):
        raise UsageError("trace: a parameter has no shape yet (a lazy layer); run the model once before it is traced")
    if type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        raise UsageError("trace: trace the model before torch.compile")
    if unwrapped(model) is not model:
        raise UsageError(f"trace: trace the model before it is wrapped in {type(model).__name__}")


def _untraced(name: str, call: Call, error: Untraceable) -> TracedBlock:
    where = "" if error.place is None else f" ({spoken(error.place)})"
    return TracedBlock(name, type(call.block).__name__, {}, reason=f"{error}{where}")


def _failure(name: str, call: Call, error: Untraceable) -> str:
    """Return what an error says about one block."""
    by_hand: dict[str, list[str]] = {}
    for function, module, place in call.functions:
        where = f"{function} ({spoken(place)})"
        if where not in by_hand.setdefault(module, []):
            by_hand[module].append(where)
    where = "" if error.place is None else f", at {spoken(error.place)}"
    advice = "; ".join(f"{module} for {', '.join(places)}" for module, places in by_hand.items())
    return (
        f"block {name!r} ({type(call.block).__name__}) cannot be traced{where}: {error}. "
        f"Write modules into it by hand instead of functions: {advice}; or leave it as it is with strict=False"
    )


# ---- the proof ----


class _Different(Exception):
    """The traced model does not compute what it did.  ``block``: the one that is to blame; None where none is known."""

    def __init__(self, message: str, block: str | None) -> None:
        super().__init__(message)
        self.block = block


def _compare(before: Run, outputs: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise _Different where the traced model gives other bits for the example, naming the first block that does."""
    again = Run(before.model)
    try:
        found = again.run(args, kwargs)
    except Unexpected as error:
        raise _Different(str(error), error.block) from error
    except Exception as error:
        raise _Different(f"after tracing the model raises {type(error).__name__}: {error}", None) from error
    if equal(outputs, found):
        return
    names = list(before.calls)[::-1]
    differing = [n for n in names if n in again.calls and not equal(before.calls[n].output, again.calls[n].output)]
    inside = [n for n in differing if not any(o != n and o.startswith(f"{n}." if n else "") for o in differing)]
    block = inside[-1] if inside else None
    where = "the model" if block is None else f"block {block!r}"
    raise _Different(
        f"{where} gives other outputs after tracing, so it was not changed; does its forward keep a state or ask "
        "whether it is being traced? Write its joins by hand (lsquant.nn.Add(), ...)",
        block,
    )


def _compare_doubled(model: nn.Module, outputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise _Different where the traced model does not take twice the batch as it did before."""
    try:
        found = output(model, args, kwargs)
    except Unexpected as error:
        raise _Different(f"a block depends on the size of the batch: {error}", error.block) from error
    except Exception as error:
        message = f"with twice the batch the model raises after tracing {type(error).__name__}: {error}"
        raise _Different(message, None) from error
    if not equal(outputs, found):
        raise _Different(
            "with twice the batch the model gives other outputs after tracing, so it was not changed", None
        )
