"""The learning rate at every iteration: cosine decay without restarts, with an optional warm-up.

Source: Loshchilov and Hutter, arXiv:1608.03983, equation 5 without restarts; used by LSQ (arXiv:1902.08153, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lsquant._util.errors import UsageError


@dataclass(frozen=True)
class CosineSchedule:
    """Scale learning rates by a linear warm-up and a cosine.

    factor(i) = (i + 1) / warmup                                                          for i < warmup
    factor(i) = floor + (1 - floor) * (1 + cos(pi * (i - warmup) / (total - warmup))) / 2   else

    total: iterations of the whole run
    warmup: iterations of linear warm-up
    floor: the factor at the end

    The factor depends on the iteration alone, so resuming needs no state.

    Raises: UsageError for numbers out of range.
    """

    total: int
    warmup: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.warmup < self.total or not 0.0 <= self.floor <= 1.0:
            raise UsageError(
                f"total={self.total}, warmup={self.warmup}, floor={self.floor}: "
                "total must be at least 1, warmup in 0 .. total-1, floor in 0 .. 1"
            )

    def factor(self, iteration: int) -> float:
        """Return the factor on every group's initial learning rate at `iteration`, counted from 0."""
        if iteration < self.warmup:
            return (iteration + 1) / self.warmup
        progress = min(1.0, (iteration - self.warmup) / (self.total - self.warmup))
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def apply(self, optimizer: torch.optim.Optimizer, iteration: int) -> None:
        """Set the learning rate of every group for `iteration`; each group's first one is kept as `initial_lr`."""
        factor = self.factor(iteration)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
