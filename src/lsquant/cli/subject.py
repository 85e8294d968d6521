"""What `export`, `verify` and `check` are about: a run, or a model of the user's own."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from lsquant._util.errors import UsageError
from lsquant._util.files import require_no_link
from lsquant.cli.user_model import UserModel
from lsquant.cli.words import VECTORS
from lsquant.formats import DEFAULT, INTEGER_ONLY, FileFormat
from lsquant.runs import Run, is_run
from lsquant.runs.log_reader import read_metrics
from lsquant.tasks import open_run

BATCH = 250  # samples of a batch of a run's data
TIMED = 64  # of the batch that is timed beside a single sample


class Subject(Protocol):
    """A trained model with its data."""

    @property
    def more_options(self) -> str:
        """What stands for the options that `lsquant export PATH` needs besides."""
        ...

    @property
    def profile(self) -> str:
        """What is exported and verified unless the user says otherwise."""
        ...

    def model(self) -> nn.Module:
        """Return the trained model."""
        ...

    def exported(self, row: FileFormat) -> Path:
        """Return where the exported file of a format lies unless the user says otherwise."""
        ...

    def test_batches(self) -> Iterable[Any]:
        """Return the batches on which an exported file is compared with the model."""
        ...

    def check_batches(self) -> Iterable[Any] | None:
        """Return the batches on which a model is checked; None checks it without data."""
        ...

    @property
    def example_input(self) -> Any:
        """One input, as the exporters take it."""
        ...

    def few_samples(self) -> Any:
        """Return a batch of VECTORS samples for --vectors."""
        ...

    def compared(self) -> nn.Module:
        """Return what `compare` compares files with: of an integer-only run that form."""
        ...

    def timed_batch(self) -> Any:
        """Return the batch on which files are timed."""
        ...

    def metrics(self, model: nn.Module) -> Mapping[str, float]:
        """Measure a model on the test data; empty where there is nothing to measure by."""
        ...

    def float_metrics(self) -> Mapping[str, float]:
        """Return what the float network measured; empty where that is not known."""
        ...

    def comparison_file(self) -> Path | None:
        """Return where `compare` keeps its result, for the page of `report`; None: nowhere."""
        ...


@dataclass(frozen=True)
class RunModel:
    """The trained model of a run with the data of its task."""

    run: Run
    more_options = ""

    @property
    def profile(self) -> str:
        return DEFAULT if self.run.recipe.joins is None else INTEGER_ONLY

    def model(self) -> nn.Module:
        return self.run.model()

    def exported(self, row: FileFormat) -> Path:
        require_no_link(self.run.file("export"))
        return self.run.file(f"export/{row.file_name}")

    def test_batches(self) -> Iterable[Any]:
        return self.run.task.batches("test", batch_size=BATCH)

    def check_batches(self) -> Iterable[Any]:
        return self.run.task.batches("calibration", batch_size=BATCH, seed=self.run.settings.seed)

    @cached_property
    def example_input(self) -> Any:
        return self.run.task.example_input()

    def few_samples(self) -> Any:
        return next(iter(self.run.task.batches("test", batch_size=VECTORS)))

    def compared(self) -> nn.Module:
        return self.run.network()

    def timed_batch(self) -> Any:
        return next(iter(self.run.task.batches("test", batch_size=TIMED)))

    def metrics(self, model: nn.Module) -> Mapping[str, float]:
        return self.run.task.metric(model)

    def float_metrics(self) -> Mapping[str, float]:
        metrics = self.run.file("metrics.json")
        return read_metrics(metrics).get("float", {}) if metrics.is_file() else {}

    def comparison_file(self) -> Path:
        require_no_link(self.run.file("export"))
        return self.run.file("export/compare.json")


def subject_of(a: Namespace) -> Subject:
    """Return the user's own model where --model or --data names a function, else the run."""
    if a.model is not None or (a.data is not None and not is_run(a.path)):
        if a.task is not None:
            raise UsageError(f"--task {a.task} is for a RUN: leave it out where --model builds the model")
        return UserModel.of(a, a.path)
    return RunModel(run_of(a, "--model package.module:build and --data"))


def run_of(a: Namespace, file_needs: str) -> Run:
    """Open the run that RUN names, with the task of --task and the data of --data.

    file_needs: the options that a FILE in its place needs

    Raises: UsageError for a file; what `open_run` raises.
    """
    if Path(a.path).is_file():
        raise UsageError(f"{a.path} is a file, not a run directory, and needs {file_needs}")
    return open_run(a.path, **given(a, "task", "data"))


def given(a: Namespace, *names: str) -> dict[str, Any]:
    """Return the options of these names that were given on the command line."""
    return {name: value for name in names if (value := getattr(a, name)) is not None}
