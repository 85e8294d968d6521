"""Lightning: callbacks that check and log the quantizers."""

from __future__ import annotations

import os
from typing import Any

from lsquant._util.errors import UsageError
from lsquant._util.optional import require
from lsquant.integrations.watch import EVERY, Problems, Watch, flat
from lsquant.training import TransitionRate

pytorch = require("lightning.pytorch", extra="integrations")


class QuantizerCallback(pytorch.Callback):
    """Refuse an optimizer that decays or misses steps before training, and log facts about quantizers during it.

    The facts go to the trainer's loggers (TensorBoard and others) as well.

    every: optimizer steps between two rows
    log: a JSON-lines file
    problems: "raise", "warn" or "ignore"
    oscillation_every: optimizer steps between two looks of ``lsquant.training.Oscillation``, whose state is in
        Lightning's checkpoints

    ``last``: the latest row, {"iteration", "quantizers": ``lsquant.training.quantizer_facts(module)``}, with
        ``oscillation`` among them
    """

    def __init__(
        self,
        every: int = 100,
        *,
        log: str | os.PathLike[str] | None = None,
        problems: Problems = "raise",
        oscillation_every: int = EVERY,
    ) -> None:
        self.watch = Watch(every, log, problems, oscillation_every)

    @property
    def last(self) -> dict[str, Any]:
        return self.watch.last

    def state_dict(self) -> dict[str, Any]:
        return self.watch.oscillation.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watch.state = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.watch.begin(pl_module, list(trainer.optimizers))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        row = self.watch.look(pl_module, trainer.global_step + 1, trainer.is_global_zero)
        if row is not None:
            for logger in trainer.loggers:
                logger.log_metrics(flat(row), step=trainer.global_step)


class TransitionCallback(pytorch.Callback):
    """Apply ``lsquant.training.TransitionRate`` over the whole training; Lightning's checkpoints hold its state.

    The module has one optimizer, built over ``lsquant.param_groups(..., low_bit=True)``. K, R and U go
    to Trainer's loggers every ``log_every_n_steps``.

    first, options: as for ``TransitionRate``
    steps: of the optimizer, in the whole training; by default Trainer's ``estimated_stepping_batches``

    ``control``: the ``TransitionRate``, once training has begun

    Raises: UsageError for several optimizers; for a training of unknown length or with manual optimization, without
    steps; for a checkpoint to resume from that has no state of this callback.
    """

    def __init__(self, first: float = 0.002, *, steps: int | None = None, **options: Any) -> None:
        self.first, self.steps, self.options = first, steps, options
        self.control: TransitionRate | None = None
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {} if self.control is None else self.control.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1:
            raise UsageError(f"TransitionCallback: {len(trainer.optimizers)} optimizers; it acts on one")
        if self.control is not None:  # of a training that ended by an error
            self.control.close()
        steps = self._length(trainer, pl_module)
        self.control = TransitionRate(pl_module, trainer.optimizers[0], self.first, steps=steps, **self.options)
        if self.state:
            self.control.load_state_dict(self.state)
            self.state = {}
        elif trainer.global_step:
            raise UsageError(
                "TransitionCallback: the checkpoint has no state of this callback, so the transition rate cannot go on "
                f"at step {trainer.global_step}; start anew, or leave the callback out"
            )

    def _length(self, trainer: Any, pl_module: Any) -> int:
        """Return the number of optimizer steps of the whole training."""
        if self.steps is not None:
            return self.steps
        if not pl_module.automatic_optimization:
            raise UsageError("TransitionCallback: with manual optimization give steps=, those of the optimizer")
        found = trainer.estimated_stepping_batches
        if not 1 <= found < float("inf"):
            raise UsageError("TransitionCallback: unknown length of training; give Trainer max_steps or max_epochs")
        return int(found)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.control is not None and trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(self.control.numbers(), step=trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.control is not None:
            self.control.close()
