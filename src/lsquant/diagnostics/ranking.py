"""``sensitivity``: which quantizer costs most, by switching one off at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lsquant._util.batches import Forward, evaluating, run_batch, take, trained_model, unwrapped
from lsquant._util.errors import UsageError
from lsquant.nn import quantizers

Metric = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Sensitivity:
    """What one quantizer costs.

    name: of the quantizer.
    spec: in words.
    base: the metric with all quantizers on.
    without: the metric with this one off.
    gain: the change for the better.
    """

    name: str
    spec: str
    base: float
    without: float
    gain: float

    def __str__(self) -> str:
        return f"{self.name}: {self.base:.6g}, without it {self.without:.6g} (gain {self.gain:+.4g}); {self.spec}"


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Metric,
    *,
    max_batches: int | None = 8,
    forward: Forward | None = None,
    higher_is_better: bool = True,
) -> list[Sensitivity]:
    """Measure what each quantizer costs: the metric with it alone switched off, against all on.

    The model runs in eval mode without gradients, and is left as it was.  Quantizers that are off already stay off and
    are left out.

    batches: as for ``calibrate``; they are kept in memory and run once per quantizer and once more.
    metric: ``metric(output, batch)`` gives a number; the mean over batches counts, every batch alike, so give batches
        of equal size.
    max_batches: read at most so many; None: all.
    forward: ``forward(model, batch)`` runs the model on one batch.
    higher_is_better: False for a loss.
    Returns: one Sensitivity a quantizer, the largest gain first.
    Raises: UsageError without quantizers or batches, and for a metric that gives no number, or NaN with all on.
    """
    model = trained_model(unwrapped(model))
    on = [(name, q) for name, q in quantizers(model) if q.enabled]
    if not on:
        raise UsageError(
            "sensitivity: the model has no quantizer that is on; call lsquant.prepare(model, recipe) first"
        )
    kept = list(take(batches, max_batches))

    def measure() -> float:
        return math.fsum(_number(metric(run_batch(model, batch, forward), batch)) for batch in kept) / len(kept)

    found = []
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        base = measure()
        if math.isnan(base):
            raise UsageError("sensitivity: the metric is NaN with all quantizers on; look at lsquant.check(model)")
        for name, quantizer in on:
            quantizer.enabled = False
            try:
                without = measure()
            finally:
                quantizer.enabled = True
            gain = without - base if higher_is_better else base - without
            found.append(Sensitivity(name, str(quantizer.spec), base, without, gain))
    return sorted(found, key=lambda s: math.inf if math.isnan(s.gain) else -s.gain)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"sensitivity: metric(output, batch) gave a {type(value).__name__}, not a number: {error}"
        ) from error
