"""Something raised anywhere inside a call, and models compared with what they were, bit for bit."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from lsquant import UsageError

ERRORS = (KeyboardInterrupt, MemoryError, RuntimeError, UsageError)

PLACES = ("lsquant/", "torch/nn/modules/module.py")
SPARED = ("_util/rollback.py",)
"""Puts things back: it is tried by what is raised elsewhere."""


def calls_inside(function: Callable[[], Any]) -> int:
    """How many functions of lsquant, and of torch's modules, a call enters."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += _counts(frame, event)

    _traced(trace, function)
    return count


def raising_inside(function: Callable[[], Any], number: int, error: type[BaseException]) -> BaseException | None:
    """Make a call, raise an error when it enters the function of that number, and return what comes out of it."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += _counts(frame, event)
        if count == number:
            sys.settrace(None)
            raise error("raised by the test")

    try:
        _traced(trace, function)
    except BaseException as caught:  # noqa: BLE001
        return caught
    return None


def _counts(frame: FrameType, event: str) -> bool:
    """Whether a function is entered that is to fail: none of what puts things back, no generator being closed."""
    if event != "call" or frame.f_code.co_flags & inspect.CO_GENERATOR or not _is_in(frame, PLACES):
        return False
    above: FrameType | None = frame
    while above is not None:
        if _is_in(above, SPARED):
            return False
        above = above.f_back
    return True


def _is_in(frame: FrameType, files: tuple[str, ...]) -> bool:
    name = frame.f_code.co_filename.replace("\\", "/")
    return any(file in name for file in files)


def _traced(trace: Callable[[FrameType, str, Any], None], function: Callable[[], Any]) -> None:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)


def some(count: int, number: int) -> Iterator[int]:
    """Give ``number`` of the numbers from 1 to count, evenly, the first and the last included."""
    step = max(1, (count - 1) // max(1, number - 1))
    yield from range(1, count, step)
    yield count


_CONTAINERS = [name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))]


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything that a model is: classes, objects, attributes, hooks, modes, and the bits of its tensors."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name} class"] = type(module)
        for key, value in vars(module).items():
            if key in _CONTAINERS:
                items = value.items() if isinstance(value, dict) else ((k, None) for k in sorted(value))
                found[f"{name} {key}"] = [(k, id(v)) for k, v in items]
            elif key == "_mirror":
                found[f"{name} {key}"] = (value.spec, value.count, value.initialized)
            else:
                found[f"{name} {key}"] = value
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found[f"{name} values"] = (t.dtype, tuple(t.shape), t.stride(), t.requires_grad, bytes(raw.numpy()))
    return found


def assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    """Compare a model with its anatomy of before."""
    now = anatomy(model)
    assert set(now) == set(before), set(now) ^ set(before)
    different = [name for name, value in before.items() if now[name] != value]
    assert not different, {name: (before[name], now[name]) for name in different[:3]}


def everywhere_inside(make: Callable[[], nn.Module], call: Callable[[nn.Module], Any], points: int) -> None:
    """Raise each kind of error at some points of a call; what a library function catches itself does not count."""
    raised, example = 0, make()
    count = calls_inside(lambda: call(example))
    for turn, number in enumerate(some(count, points)):
        model = make()
        before = anatomy(model)
        caught = raising_inside(lambda: call(model), number, ERRORS[turn % len(ERRORS)])  # noqa: B023
        if caught is not None:
            raised += 1
            assert_as_before(model, before)
    assert raised > points // 2
