"""What the tests of layers more share with others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.layers import ready
from lsquant import QuantSpec

CHANNEL = QuantSpec(4, granularity="channel")

KINDS: dict[str, tuple[Any, Any]] = {
    "tensor": (4, 4),
    "channel": (CHANNEL, 4),
    "2/8": (2, 8),
    "LSQ+": (4, QuantSpec(4, offset=True)),
    "LSQ+, channel": (CHANNEL, QuantSpec(3, offset=True, signed=True)),
}


def conv1d_of_transformers(out: int, features: int) -> nn.Module:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(out, features)
    nn.init.normal_(layer.bias)
    return layer

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv1d, stride, dilation, groups": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=3, groups=2), (2, 4, 9),
    ),
    "conv1d, depthwise, no bias": (lambda: nn.Conv1d(4, 8, 2, groups=4, bias=False), (2, 4, 9)),
    "conv1d, same, even": (lambda: nn.Conv1d(3, 5, 4, padding="same", dilation=2), (2, 3, 9)),
    "conv1d, valid": (lambda: nn.Conv1d(3, 5, 4, padding="valid"), (2, 3, 9)),
    "conv1d, reflect": (lambda: nn.Conv1d(3, 5, 3, padding=2, padding_mode="reflect"), (2, 3, 9)),
    "conv1d, same, even, circular": (lambda: nn.Conv1d(3, 5, 4, padding="same", padding_mode="circular"), (2, 3, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 4, 5, 3)),
    "conv3d, unequal": (
        lambda: nn.Conv3d(4, 6, (1, 2, 3), (2, 1, 1), (0, 1, 2), (1, 2, 1), groups=2, bias=False), (2, 4, 4, 5, 3),
    ),
    "conv3d, same, replicate": (
        lambda: nn.Conv3d(2, 4, (2, 3, 1), padding="same", padding_mode="replicate"), (2, 2, 4, 5, 3),
    ),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "transposed1d, all": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, padding=2, output_padding=2, groups=2, dilation=2), (2, 4, 5),
    ),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
    "transposed2d, unequal": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (0, 1), (1, 0), groups=2, bias=False, dilation=(1, 2)),
        (2, 4, 3, 4),
    ),
    "transposed2d, depthwise": (lambda: nn.ConvTranspose2d(4, 8, 2, stride=2, groups=4), (2, 4, 3, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2), (2, 4, 3, 2, 2)),
    "transposed3d, all": (
        lambda: nn.ConvTranspose3d(2, 3, (2, 1, 3), (1, 2, 2), (1, 0, 1), (0, 1, 1), dilation=(2, 1, 1)),
        (2, 2, 3, 2, 2),
    ),
    "Conv1D": (lambda: conv1d_of_transformers(5, 12), (3, 4, 12)),
}  # fmt: skip


def made(name: str, kind: str) -> tuple[Any, torch.Tensor]:
    make, shape = LAYERS[name]
    x = torch.randn(shape) + 0.2
    return ready(make(), x, *KINDS[kind]), x
