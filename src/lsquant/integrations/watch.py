"""What the callbacks of all frameworks share: check model and optimizer before training, log facts during it."""

from __future__ import annotations

import os
import warnings
from typing import Any, Literal

from torch import nn

from lsquant._util.errors import UsageError
from lsquant.diagnostics import check
from lsquant.nn import quantizers
from lsquant.training import Log, Oscillation, quantizer_facts
from lsquant.training.log import flat as flat
from lsquant.training.oscillation import EVERY as EVERY

Problems = Literal["raise", "warn", "ignore"]

SERIOUS = {"not_prepared", "step_unset", "step_not_finite", "tied_twice", "step_missing", "stale_parameters",
           "step_decayed"}  # fmt: skip
"""Findings of ``lsquant.check`` that make training give another model than intended."""
MINOR = {"weight_missing", "step_frozen", "switched_off"}
"""Findings that may be intended: always a warning."""


class Watch:
    """Check model and optimizer before training, and log facts about the quantizers during it.

    every: optimizer steps between two rows
    log: a JSON-lines file; None writes none
    problems: "raise" an error, "warn" or "ignore" when the optimizer decays, misses or replaces steps
    oscillation_every: optimizer steps between two looks of ``lsquant.training.Oscillation``

    ``last``: the latest row, {"iteration": ..., "quantizers": ``lsquant.training.quantizer_facts(model)``}, and in it
        ``oscillation`` once its window is full
    ``state``: of Oscillation, from a checkpoint, to go on with

    Raises: UsageError for an argument out of range.
    """

    def __init__(
        self, every: int, log: str | os.PathLike[str] | None, problems: Problems, oscillation_every: int = EVERY
    ) -> None:
        if type(every) is not int or every < 1:
            raise UsageError(f"QuantizerCallback: every={every!r}; give a number of optimizer steps, at least 1")
        if problems not in ("raise", "warn", "ignore"):
            raise UsageError(f"QuantizerCallback: problems={problems!r}; use 'raise', 'warn' or 'ignore'")
        self.every, self.problems, self.log = every, problems, Log(log)
        self.last: dict[str, Any] = {}
        self.state: dict[str, Any] | None = None
        self.oscillation = Oscillation(nn.Module(), oscillation_every)

    def begin(self, model: nn.Module, optimizers: Any) -> None:
        """Check model and optimizers before the first step. Raises: UsageError listing what is wrong and what to do."""
        for _, quantizer in quantizers(model):
            quantizer._refresh()  # DDP has copied the first process's buffers
        self.oscillation = Oscillation(model, self.oscillation.every)
        if self.state is not None:
            self.oscillation.load_state_dict(self.state)
        if self.problems == "ignore":
            return
        findings = check(model, optimizers)
        serious = [f for f in findings if f.code in SERIOUS]
        if serious and self.problems == "raise":
            more = f"\nand {len(serious) - 3} more of {len(serious)}" if len(serious) > 3 else ""
            raise UsageError("training would go wrong:\n" + "\n".join(map(str, serious[:3])) + more)
        for finding in findings:
            if finding.code in SERIOUS | MINOR:
                warnings.warn(str(finding), stacklevel=2)

    def look(self, model: nn.Module, iteration: int, write: bool = True) -> dict[str, Any] | None:
        """Return the row of every `every`-th iteration, else None; call it between backward and step.

        iteration: of the optimizer, counted from 1
        write: whether this process logs
        """
        if write:
            self.oscillation.look()
        if iteration % self.every or not write:
            return None
        facts = quantizer_facts(model)
        for name, share in self.oscillation.shares().items():
            facts[name]["oscillation"] = share
        self.last = {"iteration": iteration, "quantizers": facts}
        self.log.append(self.last)
        return self.last
