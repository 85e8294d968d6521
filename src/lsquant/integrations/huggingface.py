"""Hugging Face Trainer: an optimizer that never decays steps, callbacks that check and log the quantizers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lsquant._util.errors import UsageError
from lsquant._util.optional import require
from lsquant.integrations.watch import EVERY, Problems, Watch, flat
from lsquant.training import TransitionRate, param_groups
from lsquant.training.state import load_state, save_state

transformers = require("transformers", extra="integrations")


def optimizer(
    model: nn.Module,
    args: Any,
    *,
    step_lr: float | None = None,
    relative_step_lr: float | None = None,
    weight_decay_by_bits: bool = False,
    low_bit: bool = False,
) -> torch.optim.Optimizer:
    """Build the optimizer that ``TrainingArguments`` ask for, over ``lsquant.param_groups``: steps are never decayed.

    ``Trainer(model, args, optimizers=(optimizer(model, args), None), ...)``; None lets Trainer make its schedule.

    model: prepared
    args: Trainer's
    step_lr, relative_step_lr, weight_decay_by_bits, low_bit: as for ``lsquant.param_groups``

    Raises: UsageError for optimizers of Trainer that choose their own parameters (GaLore, LOMO, layer-wise ones).
    """
    cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
    own = {"params", "model", "optimizer_dict"} & set(options)
    if own or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise UsageError(
            f"huggingface.optimizer: optim={str(getattr(args.optim, 'value', args.optim))!r} chooses its parameters "
            "itself, so lsquant cannot give it groups; use another optim, or build it by hand"
        )
    groups = param_groups(
        model,
        args.learning_rate,
        args.weight_decay,
        step_lr=step_lr,
        relative_step_lr=relative_step_lr,
        weight_decay_by_bits=weight_decay_by_bits,
        low_bit=low_bit,
    )
    return cls(groups, **options)


class QuantizerCallback(transformers.TrainerCallback):
    """Refuse an optimizer that decays or misses steps before training, and log facts about quantizers during it.

    every: optimizer steps between two rows
    log: a JSON-lines file
    report: called with a flat dictionary of numbers, for instance ``trainer.log`` (set it after the trainer is made)
    problems: "raise", "warn" or "ignore"
    oscillation_every: optimizer steps between two looks of ``lsquant.training.Oscillation``. Its state is in Trainer's
        checkpoints (``oscillation.safetensors``). It is restored where the folder of the present run has the checkpoint
        that is resumed; elsewhere its window begins anew

    ``last``: the latest row, {"iteration", "quantizers": ``lsquant.training.quantizer_facts(model)``}, with
        ``oscillation`` among them
    """

    def __init__(
        self,
        every: int = 100,
        *,
        log: str | os.PathLike[str] | None = None,
        report: Callable[[dict[str, float]], Any] | None = None,
        problems: Problems = "raise",
        oscillation_every: int = EVERY,
    ) -> None:
        self.watch, self.report = Watch(every, log, problems, oscillation_every), report

    @property
    def last(self) -> dict[str, Any]:
        return self.watch.last

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = _beside(args, state, "oscillation.safetensors")
        self.watch.state = load_state(found) if state.global_step and found.is_file() else None
        self.watch.begin(kwargs["model"], kwargs["optimizer"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = _beside(args, state, "oscillation.safetensors")
        if state.is_world_process_zero and path.parent.is_dir():
            save_state(path, self.watch.oscillation.state_dict())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = self.watch.look(kwargs["model"], state.global_step + 1, state.is_world_process_zero)
        if row is not None and self.report is not None:
            self.report(flat(row))


class TransitionCallback(transformers.TrainerCallback):
    """Apply ``lsquant.training.TransitionRate`` over the whole training; Trainer's checkpoints hold its state.

    Give Trainer ``optimizer(model, args, low_bit=True)``. The schedule has Trainer's ``max_steps``.

    first, options: as for ``TransitionRate``
    report: called with K, R and U (``transition_rate``, ``transition_target``, ``transition_lr``), for instance
        ``trainer.log`` (set it after the trainer is made)
    every: optimizer steps between two calls of `report`

    ``control``: the ``TransitionRate``, once training has begun

    Raises: UsageError where training resumes from a checkpoint without its state (``transition.safetensors``).
    """

    def __init__(
        self,
        first: float = 0.002,
        *,
        every: int = 100,
        report: Callable[[dict[str, float]], Any] | None = None,
        **options: Any,
    ) -> None:
        self.first, self.every, self.report, self.options = first, every, report, options
        self.control: TransitionRate | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        if self.control is not None:  # of a training that ended by an error
            self.control.close()
        self.control = TransitionRate(kwargs["model"], optimizer, self.first, steps=state.max_steps, **self.options)
        if state.global_step:
            found = _beside(args, state, "transition.safetensors")
            if not found.is_file():
                raise UsageError(
                    f"TransitionCallback: {found} does not exist, so the transition rate cannot go on at step "
                    f"{state.global_step}; resume in the folder of the run, or start anew"
                )
            self.control.load_state_dict(load_state(found))
            if self.control.done != state.global_step:
                raise UsageError(f"TransitionCallback: {found} is of step {self.control.done}, not {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.control is not None and self.report is not None and state.global_step % self.every == 0:
            self.report(self.control.numbers())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = _beside(args, state, "transition.safetensors")
        if self.control is not None and state.is_world_process_zero and path.parent.is_dir():
            save_state(path, self.control.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.control is not None:
            self.control.close()


def _beside(args: Any, state: Any, name: str) -> Path:
    """Return a file in Trainer's checkpoint of the present step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / name
