"""A task of one's own for short runs: the digits with a narrow network, and teachers of other widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import lsquant
from lsquant.tasks import Run, Settings, run_training
from lsquant.tasks.digits import Digits, DigitsNet

RECIPE = lsquant.Recipe.preset("w2a2")


class SmallDigits(Digits):
    settings = Settings(float_epochs=2, epochs=4, batch_size=200, float_lr=0.05, calibration_batches=2, threads=1)

    def architectures(self) -> dict[str, Callable[[], nn.Module]]:
        return {f"width{n}": partial(DigitsNet, n) for n in (4, 6)}


def task() -> SmallDigits:
    return SmallDigits(width=4)


def float_files(folder: Path) -> dict[int, str]:
    """Float checkpoints by width, trained a little."""
    found = {}
    for width in (4, 5, 6):
        torch.manual_seed(width)
        net = DigitsNet(width)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for x, y in (batch for epoch in range(2) for batch in task().batches("train", batch_size=100, epoch=epoch)):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        found[width] = str(folder / f"width{width}.safetensors")
        save_file(net.state_dict(), found[width])
    return found


def small(path: Path, files: dict[int, str], teacher: str | None = None, **changes: Any) -> Run:
    changes = {"epochs": 1, "calibration_batches": 1} | changes
    return Run(path, task(), RECIPE, replace(SmallDigits.settings, **changes), files[4], teacher)


def network(files: dict[int, str], width: int = 4) -> DigitsNet:
    net = DigitsNet(width)
    net.load_state_dict(load_file(files[width]))
    return net


def rounded(files: dict[int, str], batch_size: int, **options: Any) -> Any:
    """The float network of `files` at 2 bits, calibrated on one batch."""
    net = network(files)
    lsquant.prepare(net, RECIPE, example_inputs=task().example_input())
    lsquant.calibrate(net, task().batches("calibration", batch_size=batch_size), max_batches=1, **options)
    return net


def model_file(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.file("model.safetensors"))


class Stop(BaseException):
    """Stands in for a kill."""


def stopped(run: Run) -> None:
    """The run, killed before its first training."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsquant.runs.training, "fit", stop)
        with pytest.raises(Stop):
            run_training(run, quiet=True)
