"""What the callbacks of all frameworks do: look at model and optimizer before training, write facts during it."""

from __future__ import annotations

import os
import warnings
from typing import Any, Literal

from torch import nn

from lsquant._util.errors import UsageError
from lsquant.diagnostics import check
from lsquant.nn import quantizers
from lsquant.training import Log, quantizer_facts

Problems = Literal["raise", "warn", "ignore"]

SERIOUS = {"not_prepared", "step_unset", "step_not_finite", "tied_twice", "step_missing", "stale_parameters",
           "step_decayed"}  # fmt: skip
"""Findings of ``lsquant.check`` with which training gives another model than was meant."""
MINOR = {"weight_missing", "step_frozen", "switched_off"}
"""Findings that may be meant: always a warning."""


class Watch:
    """every: optimizer steps between two looks.  log: a JSON-lines file, one row a look, or None.
    problems: "raise" an error, "warn" or "ignore" when the optimizer decays, misses or replaces steps.

    ``last``: the latest row, {"iteration": ..., "quantizers": ``lsquant.training.quantizer_facts(model)``}.
    """

    def __init__(self, every: int, log: str | os.PathLike[str] | None, problems: Problems) -> None:
        if type(every) is not int or every < 1:
            raise UsageError(f"QuantizerCallback: every={every!r}; give a number of optimizer steps, at least 1")
        if problems not in ("raise", "warn", "ignore"):
            raise UsageError(f"QuantizerCallback: problems={problems!r}; use 'raise', 'warn' or 'ignore'")
        self.every, self.problems, self.log = every, problems, Log(log)
        self.last: dict[str, Any] = {}

    def begin(self, model: nn.Module, optimizers: Any) -> None:
        """Before the first step.  Raises: UsageError listing what is wrong and what to do."""
        for _, quantizer in quantizers(model):
            quantizer.read_state()  # DDP has copied the first process's buffers
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
        """Between backward and the optimizer's step `iteration`, counted from 1: the row, every so often; else None."""
        if iteration % self.every or not write:
            return None
        self.last = {"iteration": iteration, "quantizers": quantizer_facts(model)}
        self.log.append(self.last)
        return self.last


def flat(row: dict[str, Any]) -> dict[str, float]:
    """{"quantizers/conv1.weight_quantizer/step": 0.1, ...}, as trackers take it; what is None is left out."""
    facts = ((f"quantizers/{name}/{key}", v) for name, some in row["quantizers"].items() for key, v in some.items())
    return {key: float(value) for key, value in facts if value is not None}
