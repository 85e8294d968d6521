"""Convolutions of one and three dimensions, transposed ones, transformers' Conv1D: cases, and outputs by the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import oracle
from helpers.layers import array, ready
from lsquant import QuantSpec

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
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


def expected(layer: Any, x: torch.Tensor, extra: Any = None) -> torch.Tensor:
    """The layer's output by the oracle.  extra: the output padding, where it is not the layer's own."""
    xq, wq = layer.input_quantizer, layer.weight_quantizer
    s_x, s_w = array(xq.effective_step()), array(wq.effective_step())
    values, w = array(x), array(layer.weight)
    z = 0.0
    if xq.offset is not None:
        z = float(oracle.lsq_plus_zero_point(array(xq.offset), s_x, xq.q_min, xq.q_max)[0])
    bias = None if layer.bias is None else array(layer.bias)
    if isinstance(layer, TRANSPOSED):
        per_weight = s_w[oracle.output_channels(w.shape, layer.groups)] if len(s_w) > 1 else np.full(w.shape, s_w[0])
        q_w = np.clip(np.rint(w / per_weight), wq.q_min, wq.q_max)
        q_x = oracle.codes(values, s_x, xq.q_min, xq.q_max, z)
        options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        extra = layer.output_padding if extra is None else extra
        return torch.tensor(oracle.transposed_convolution(q_x, z, s_x[0], q_w, s_w, bias, *options, extra))
    kind = {"axis": layer.weight.dim() - 1 if w.ndim == 2 else 0} if len(s_w) > 1 else {}
    q_w = oracle.codes(w, s_w, wq.q_min, wq.q_max, **kind)
    if w.ndim == 2:  # transformers' Conv1D: (in, out)
        return torch.tensor(
            oracle.linear(oracle.codes(values, s_x, xq.q_min, xq.q_max, z), z, s_x[0], q_w.T, s_w, bias)
        )
    sides = [(p, p) for p in layer.padding] if not isinstance(layer.padding, str) else [(0, 0)] * (w.ndim - 2)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in totals]
    if layer.padding_mode != "zeros":
        mode = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[layer.padding_mode]
        values, sides = np.pad(values, ((0, 0), (0, 0), *sides), mode), [(0, 0)] * len(sides)
    q_x = oracle.codes(values, s_x, xq.q_min, xq.q_max, z)
    return torch.tensor(
        oracle.convolution(q_x, z, s_x[0], q_w, s_w, bias, layer.stride, sides, layer.dilation, layer.groups)
    )
