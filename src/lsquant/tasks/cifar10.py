"""Task `cifar10`: 50,000 images of 32 x 32 pixels to train on, 10,000 to test on, and ResNet-20, 32, 44 or 56.

Scaling: (x / 255 - mean) / std with ImageNet's mean and deviation, not CIFAR-10's: the public float checkpoints of
these networks were trained so.  Training images are augmented: 4 black pixels on every side, a random crop of 32 x 32,
and a flip with probability 1/2.  Images (and so the network's activations) and weights are in channels_last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant._util.entry import shown
from lsquant._util.errors import UsageError
from lsquant.runs.settings import Settings
from lsquant.runs.task import Split
from lsquant.tasks.cifar_data import read_cifar10
from lsquant.tasks.metrics import classification_metric
from lsquant.tasks.resnet import DEPTHS, cifar_resnet
from lsquant.training.seeds import generator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAD = 4


class Cifar10:
    """The task `cifar10`; the module says more.

    data: the folder of the images, see `read_cifar10`
    model: a key of `DEPTHS`

    Raises: UsageError without `data`, or for an unknown model.
    """

    name = "cifar10"
    settings = Settings(batch_size=128, float_epochs=100, epochs=5, lr=0.01, calibration_batches=8)

    def __init__(self, data: str | None = None, model: str = "resnet20") -> None:
        if not isinstance(model, str):
            raise UsageError(f"task 'cifar10': model={shown(model)}; the name of a network, e.g. 'resnet20'")
        if model not in DEPTHS:
            near = " or ".join(map(repr, get_close_matches(model, DEPTHS, 2)))
            hint = f": did you mean {near}?" if near else ""
            raise UsageError(f"task 'cifar10' has no model {shown(model)}{hint}; models: {', '.join(DEPTHS)}")
        if data is None:
            raise UsageError("task 'cifar10' needs --data DIR, the folder of its images (see docs/cifar10.md)")
        if not isinstance(data, (str, os.PathLike)):
            raise UsageError(f"task 'cifar10': data={shown(data)}; the name of a folder")
        self.options: dict[str, Any] = {"data": str(data), "model": model}

    def model(self) -> nn.Module:
        return _network(self.options["model"])

    def architectures(self) -> dict[str, Callable[[], nn.Module]]:
        """Return the networks that a teacher may be."""
        return {name: partial(_network, name) for name in DEPTHS}

    def example_input(self) -> Tensor:
        """Return noise: the folder of the images is not needed for it."""
        noise = torch.randn(1, 3, 32, 32, generator=generator("cifar10 example"))
        return noise.contiguous(memory_format=torch.channels_last)

    @cached_property
    def data(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Load "train" and "test": images (N, 3, 32, 32) uint8 and labels (N,) int64."""
        return read_cifar10(self.options["data"])

    def batches(
        self, split: Split, *, batch_size: int, seed: int = 0, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.data["test" if split == "test" else "train"]
        count, draw = len(images), generator(seed, self.name, split, epoch)
        order = torch.arange(count) if split == "test" else torch.randperm(count, generator=draw)
        crops = torch.randint(0, 2 * PAD + 1, (count, 2), generator=draw)
        flips = torch.randint(0, 2, (count,), generator=draw, dtype=torch.bool)
        for at in torch.arange(count).split(batch_size):
            x = images[order[at]]
            if split == "train":
                x = crop_and_flip(x, crops[at], flips[at])
            yield normalized(x), labels[order[at]]

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self.data["train"][0]) // batch_size)

    def metric(self, model: nn.Module) -> dict[str, float]:
        return classification_metric(model, self.batches("test", batch_size=250))


def _network(name: str) -> nn.Module:
    return cifar_resnet(name).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def crop_and_flip(x: Tensor, crops: Tensor, flips: Tensor) -> Tensor:
    """Pad every image by 4 zeros, cut it to its size from (row, column) = crops[i], and mirror it where flips[i].

    x: (N, 3, H, W) uint8
    crops: (N, 2) int64, 0 .. 8
    flips: (N,) bool

    Returns x's shape and dtype.
    """
    n, channels, height, width = x.shape
    rows, across = crops[:, :1] + torch.arange(height), torch.arange(width)
    columns = crops[:, 1:] + torch.where(flips[:, None], across.flip(0), across)
    at = rows[:, :, None] * (width + 2 * PAD) + columns[:, None, :]
    padded = F.pad(x, (PAD,) * 4).flatten(2)
    return padded.gather(2, at.reshape(n, 1, -1).expand(-1, channels, -1)).reshape(x.shape)


def normalized(x: Tensor) -> Tensor:
    """Compute (x / 255 - mean) / std, each operation rounded. x: (N, 3, H, W) uint8. Returns float32, channels_last."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return x.to(torch.float32).div_(255.0).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
