"""Layers of every kind whose weights are packed."""

from __future__ import annotations

from torch import nn

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9), "channel"),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 3), "channel"),
    "up1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), "channel"),
    "up2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2), (2, 4, 5, 4), "channel"),
    "up2d tensor": (lambda: nn.ConvTranspose2d(6, 6, 3, groups=3), (2, 6, 5, 4), "tensor"),
    "up3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2), (2, 4, 3, 2, 4), "channel"),
    "conv2d groups": (lambda: nn.Conv2d(8, 6, 3, groups=2, padding_mode="reflect", padding=1), (2, 8, 6, 5), "group"),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 6, 5), "channel"),
    "linear groups": (lambda: nn.Linear(12, 5), (3, 12), "group"),
}
