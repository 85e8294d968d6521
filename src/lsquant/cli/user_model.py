"""The user's own model and data: the functions of --model and --data, and a FILE of ``lsquant.save``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from lsquant import checkpoint
from lsquant._util.batches import take
from lsquant._util.errors import UsageError
from lsquant._util.nested import map_tensors
from lsquant.cli.words import VECTORS
from lsquant.formats import DEFAULT, FileFormat
from lsquant.runs import is_run
from lsquant.tasks.user_objects import call, load_object
from lsquant.training.seeds import seed_everything


def build(place: str | None, seed: int | None) -> nn.Module:
    """Return what the function of --model returns; random weights are drawn from `seed`."""
    if place is None:
        raise UsageError("--data goes with --model package.module:build, a function that returns the float model")
    function = load_object(place)
    if isinstance(function, nn.Module):
        raise UsageError(f"{place!r} is a model, not a function that returns one")
    seed_everything(seed or 0)
    model = call(function, place)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{place!r} returned a {type(model).__name__}, not an nn.Module")
    return model


def batches(place: str | None) -> Iterable[Any]:
    """Return what the function of --data returns, called anew each time."""
    if place is None:
        raise UsageError("this needs --data package.module:batches, a function that returns an iterable of batches")
    found = call(load_object(place), place)
    if not isinstance(found, Iterable):
        raise UsageError(f"{place!r} returned a {type(found).__name__}, not an iterable of batches")
    return found


@dataclass(frozen=True)
class UserModel:
    """A model of the user's own with what a FILE has been trained to; a subject as `RunModel` is.

    path: FILE, of ``lsquant.save`` or ``lsquant calibrate``
    place: of --model
    data: of --data; None without
    seed: of --seed
    """

    path: str
    place: str | None
    data: str | None
    seed: int | None
    more_options = " ..."
    profile = DEFAULT

    @classmethod
    def of(cls, a: Namespace, path: str) -> UserModel:
        return cls(path, a.model, a.data, a.seed)

    def model(self) -> nn.Module:
        """Return the model of --model with the recipe, weights and steps of FILE, in eval mode."""
        if is_run(self.path):
            raise UsageError(
                f"{self.path} is a run directory and brings its own model and data: leave out --model and --data"
            )
        return checkpoint.load(build(self.place, self.seed), self.path).eval()

    def exported(self, row: FileFormat) -> Path:
        return Path(self.path).with_suffix(f".{row.file_name}")

    def test_batches(self) -> Iterable[Any]:
        return batches(self.data)

    def check_batches(self) -> Iterable[Any] | None:
        return None if self.data is None else batches(self.data)

    @cached_property
    def example_input(self) -> Any:
        return next(iter(take(batches(self.data), 1)))

    def few_samples(self) -> Any:
        return map_tensors(self.example_input, lambda t: t[:VECTORS] if t.dim() else t)

    def compared(self) -> nn.Module:
        return self.model()

    def timed_batch(self) -> Any:
        return self.example_input

    def metrics(self, model: nn.Module) -> Mapping[str, float]:
        return {}

    def float_metrics(self) -> Mapping[str, float]:
        return {}

    def comparison_file(self) -> None:
        return None
