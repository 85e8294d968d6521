"""Task `digits`: the 1,797 handwritten digits (8 x 8 pixels) that ship with scikit-learn, and a small residual CNN.

Split: stratified by class, always the same one (seed 0): 1,297 for training, 500 for testing.
Scaling: pixels 0 .. 16 are divided by 16; no mean is subtracted, so that inputs are never negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lsquant._util.entry import shown
from lsquant._util.errors import UsageError
from lsquant._util.optional import require
from lsquant.runs.settings import Settings
from lsquant.runs.task import Split
from lsquant.tasks.metrics import classification_metric
from lsquant.training.seeds import generator

TEST_SIZE = 500
WIDEST = 4096


class DigitsNet(nn.Module):
    """Classify digits: conv 3x3, a residual block of two, a strided conv 3x3, average pooling, linear.

    Input: (N, 1, 8, 8) float32. Returns logits (N, classes) float32.
    """

    def __init__(self, width: int = 24, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(y)) + x)
        x = F.relu(self.bn3(self.conv3(x)))
        return self.head(torch.flatten(self.pool(x), 1))


class Digits:
    """The task `digits`; the module says more.

    width: channels of the first convolution

    Raises: UsageError for a width that is none.
    """

    name = "digits"
    # one thread: the tensors are small, and the numbers are then the same whatever the number of cores
    settings = Settings(float_epochs=20, epochs=20, lr=0.03, distill=True, threads=1)

    def __init__(self, width: int = 24) -> None:
        if type(width) is not int or not 1 <= width <= WIDEST:
            raise UsageError(f"task 'digits': width={shown(width)}; a number of channels from 1 to {WIDEST}")
        self.options: dict[str, Any] = {"width": width}

    def model(self) -> nn.Module:
        return DigitsNet(**self.options)

    def example_input(self) -> torch.Tensor:
        return self.data["test"][0][:1]

    @cached_property
    def data(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Load "train" and "test": images (N, 1, 8, 8) float32 in [0, 1], and labels (N,) int64."""
        digits = require("sklearn.datasets", extra="digits").load_digits()
        x = torch.from_numpy(digits.images).to(torch.float32).unsqueeze(1) / 16.0
        y = torch.from_numpy(digits.target).to(torch.int64)
        test = _stratified(y, TEST_SIZE)
        return {"train": (x[~test], y[~test]), "test": (x[test], y[test])}

    def batches(
        self, split: Split, *, batch_size: int, seed: int = 0, epoch: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        x, y = self.data["test" if split == "test" else "train"]
        order = torch.arange(len(x))
        if split != "test":
            order = torch.randperm(len(x), generator=generator(seed, self.name, split, epoch))
        for part in order.split(batch_size):
            yield x[part], y[part]

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self.data["train"][0]) // batch_size)

    def metric(self, model: nn.Module) -> dict[str, float]:
        return classification_metric(model, self.batches("test", batch_size=250))


def _stratified(labels: torch.Tensor, size: int) -> torch.Tensor:
    """Draw `size` samples by seed 0, every class in proportion (largest remainders first). Returns a mask (N,) bool."""
    counts = torch.bincount(labels)
    quota = counts * size / len(labels)
    take = quota.floor().long()
    take[torch.argsort(quota - take, descending=True, stable=True)[: size - int(take.sum())]] += 1
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, number in enumerate(take.tolist()):
        members = torch.nonzero(labels == label).flatten()
        chosen[members[torch.randperm(len(members), generator=generator("digits split", 0, label))[:number]]] = True
    return chosen
