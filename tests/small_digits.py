"""A task of one's own for short runs: the digits with a narrow network, and teachers of other widths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from lsquant.tasks import Settings
from lsquant.tasks.digits import Digits, DigitsNet


class SmallDigits(Digits):
    settings = Settings(float_epochs=2, epochs=4, batch_size=200, float_lr=0.05, calibration_batches=2, threads=1)

    def architectures(self) -> dict[str, Callable[[], nn.Module]]:
        return {f"width{n}": partial(DigitsNet, n) for n in (4, 6)}


def task() -> SmallDigits:
    return SmallDigits(width=4)
