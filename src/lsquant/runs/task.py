"""The contract of a task: what a run asks of it, and what a task may bring besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from lsquant.runs.settings import Settings
from lsquant.training.loop import Loss

Split = Literal["train", "calibration", "test"]


class Task(Protocol):
    """Bring the model, the data and the measure of a reproducible job.

    name: as on the command line
    options: what else the task was made from; written to config.toml
    settings: the settings of a run that overrides none

    A task may have three methods more. Without them a run takes the defaults of `lsquant.runs.defaults`.

    `make_optimizer(model, settings, phase) -> Optimizer`: of a phase (`BringsOptimizer`); by default SGD, and at low
        bits what `settings.optimizer` says, over `lsquant.param_groups`.
    `make_loss(settings) -> Callable`: the training loss (`BringsLoss`); by default cross-entropy with class numbers,
        and distillation from a teacher.
    `architectures() -> dict`: networks that a teacher's checkpoint may be of (`BringsArchitectures`); by default a
        teacher is a `model()`.
    """

    name: str
    options: dict[str, Any]
    settings: Settings

    def model(self) -> nn.Module:
        """Build a float network with fresh weights, drawn from torch's global generator."""
        ...

    def example_input(self) -> torch.Tensor:
        """Return one input, as `prepare` and the exporters take it."""
        ...

    def batches(self, split: Split, *, batch_size: int, seed: int = 0, epoch: int = 0) -> Iterable[Any]:
        """Return the batches (input, target) of a split.

        "train": shuffled, and augmented where the task does so, by (seed, epoch)
        "calibration": the training data as in evaluation, in an order given by `seed`
        "test": the test data, in order
        """
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of training batches of an epoch."""
        ...

    def metric(self, model: nn.Module) -> dict[str, float]:
        """Measure `model` on the test data; the task is judged by the first number. The model's mode is restored."""
        ...


@runtime_checkable
class BringsOptimizer(Protocol):
    """A task with an optimizer of its own."""

    def make_optimizer(self, model: nn.Module, settings: Settings, phase: str) -> torch.optim.Optimizer:
        """Build the optimizer of a phase.

        phase: "float"; "lsq-8" and the like at the bits of `settings.progressive`; "lsq" at the recipe's own; "fold"
            in the integer-only form (`settings.fold_epochs`; model is a `FusedNetwork`). With
            `settings.transition_rate` the last one needs the group "low_bit" of `param_groups(..., low_bit=True)`.
        """
        ...


@runtime_checkable
class BringsLoss(Protocol):
    """A task with a training loss of its own."""

    def make_loss(self, settings: Settings) -> Loss:
        """Build `loss(output, batch, teacher_output)`, a scalar tensor; `teacher_output` is None without a teacher."""
        ...


@runtime_checkable
class BringsArchitectures(Protocol):
    """A task whose teachers may be of several architectures."""

    def architectures(self) -> dict[str, Callable[[], nn.Module]]:
        """Return networks by name; a teacher is the one whose state dict has the keys and shapes of its checkpoint."""
        ...
