"""What a run takes from its task, and the defaults where the task does not bring it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from lsquant.runs.settings import Settings
from lsquant.runs.task import BringsArchitectures, BringsLoss, BringsOptimizer, Task
from lsquant.training import classification_loss, param_groups
from lsquant.training.loop import Loss

FLOAT = "float"  # the phase of the float network
LAST = "lsq"  # the phase at the recipe's own bits; "lsq-8" and the like come before it
FOLD = "fold"  # the phase in the integer-only form, after it
STEP_LR_OF_ADAM = 3.0  # of `lr`, relative to the size of the step


def make_optimizer(task: Task, model: nn.Module, settings: Settings, phase: str) -> torch.optim.Optimizer:
    """Build the task's optimizer of a phase; by default `float_optimizer` or `low_bit_optimizer`."""
    if isinstance(task, BringsOptimizer):
        return task.make_optimizer(model, settings, phase)
    if phase == FLOAT:
        return float_optimizer(model, settings)
    return low_bit_optimizer(model, settings, phase)


def make_loss(task: Task, settings: Settings) -> Loss:
    """Build the task's loss; by default cross-entropy with class numbers, and distillation where there is a teacher."""
    if isinstance(task, BringsLoss):
        return task.make_loss(settings)
    return partial(classification_loss, temperature=settings.distill_temperature, weight=settings.distill_weight)


def architectures(task: Task) -> dict[str, Callable[[], nn.Module]]:
    """Return the networks by name that a teacher of the task may be; empty where it is a `task.model()`."""
    return task.architectures() if isinstance(task, BringsArchitectures) else {}


def float_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Build SGD with momentum for the float phase."""
    groups = param_groups(model, settings.float_lr, settings.float_weight_decay)
    return torch.optim.SGD(groups, momentum=settings.momentum)


def low_bit_optimizer(model: nn.Module, settings: Settings, phase: str) -> torch.optim.Optimizer:
    """Build `settings.optimizer` for a low-bit phase; the last one has a group "low_bit" for a transition rate."""
    relative = settings.optimizer != "sgd" and settings.step_lr is None
    lr = settings.fold_lr if phase == FOLD else settings.lr
    groups = param_groups(
        model,
        lr,
        settings.weight_decay,
        step_lr=settings.step_lr,
        relative_step_lr=STEP_LR_OF_ADAM * lr if relative else None,
        weight_decay_by_bits=settings.weight_decay_by_bits,
        low_bit=phase == LAST and settings.transition_rate is not None,
    )
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer](groups)
