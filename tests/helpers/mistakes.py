"""The table of mistakes: how one is noted, and the models they are made on."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lsquant
from lsquant import Recipe
from lsquant.cli import main

W4A4 = Recipe(4, 4)
Mistake = Callable[[Path], Any]
MISTAKES: list[tuple[Mistake, str, str]] = []


def mistake(names: str, remedy: str) -> Callable[[Mistake], Mistake]:
    """A function that makes one, and two parts of what it must be told: what is wrong, and what to do."""

    def note(function: Mistake) -> Mistake:
        MISTAKES.append((function, names, remedy))
        return function

    return note


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(self.norm(self.stem(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


class Reversed(nn.Module):
    """Executed in another order than it is defined."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.stem = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)))


def images() -> torch.Tensor:
    return torch.randn(4, 1, 6, 6)


def prepared(recipe: Recipe = W4A4, **options: Any) -> Net:
    model = Net(**options)
    lsquant.prepare(model, recipe)
    return model


def ready(recipe: Recipe = W4A4, **options: Any) -> Net:
    model = prepared(recipe, **options)
    lsquant.calibrate(model, [images()])
    return model


def command(*arguments: Any) -> str:
    """What a command that fails prints."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(a) for a in arguments])
    assert code in (2, 3)
    return error.getvalue()


def torchs_error(function: Callable[[], Any]) -> str:
    """What PyTorch says where it calls lsquant and collects what is wrong, as load_state_dict does."""
    try:
        function()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("nothing was said")


def warned(function: Callable[[], Any]) -> str:
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return "\n".join(str(warning.message) for warning in caught)
