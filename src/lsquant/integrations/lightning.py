"""Lightning: a callback that looks after the steps."""

from __future__ import annotations

import os
from typing import Any

from lsquant._util.optional import require
from lsquant.integrations.watch import EVERY, Problems, Watch, flat

pytorch = require("lightning.pytorch", extra="integrations")


class QuantizerCallback(pytorch.Callback):
    """Before training: an error where an optimizer decays or misses steps.  During it: facts every so often.

    every: optimizer steps between two looks.  log: a JSON-lines file.  problems: "raise", "warn" or "ignore".
    oscillation_every: optimizer steps between two looks of ``lsquant.training.Oscillation``, whose state is in
    Lightning's checkpoints.  The facts go to the trainer's loggers (TensorBoard and others) as well.
    ``last`` is the latest row, {"iteration", "quantizers": ``lsquant.training.quantizer_facts(module)``}, with
    ``oscillation`` among them.
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
