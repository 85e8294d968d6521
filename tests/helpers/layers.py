"""A quantized layer made ready, and its output by the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import lsquant
import oracle
from lsquant import Recipe


def ready(layer: nn.Module, x: torch.Tensor, weight: Any = 4, activation: Any = 4) -> Any:
    """The layer prepared and calibrated on x, with steps that are no round numbers."""
    lsquant.prepare(layer, Recipe(weight, activation))
    if activation is not None:
        lsquant.calibrate(layer, [x])
    return layer


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().float().numpy()


def expected(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's output by the oracle, float32: codes from the steps, then exact integer sums."""
    xq, wq = layer.input_quantizer, layer.weight_quantizer
    s_x, s_w = array(xq.effective_step()), array(wq.effective_step())
    group = wq.spec.group_size
    z = 0.0
    if xq.offset is not None:
        z = float(oracle.lsq_plus_zero_point(array(xq.offset), s_x, xq.q_min, xq.q_max)[0])
    kind = {"group_size": group} if group else {"axis": 0} if len(s_w) > 1 else {}
    q_w = oracle.codes(array(layer.weight), s_w, wq.q_min, wq.q_max, **kind)
    bias = None if layer.bias is None else array(layer.bias)
    values = array(x)
    if isinstance(layer, nn.Linear):
        q_x = oracle.codes(values, s_x, xq.q_min, xq.q_max, z)
        if group:
            return torch.tensor(oracle.linear_groups(q_x, z, s_x[0], q_w, s_w, group, bias))
        return torch.tensor(oracle.linear(q_x, z, s_x[0], q_w, s_w, bias))
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        (top, bottom), (left, right) = (
            oracle.same_padding(layer.kernel_size, layer.dilation)
            if padding == "same"
            else [(p, p) for p in oracle.pair(padding)]
        )
        mode = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[layer.padding_mode]
        values, padding = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)), mode), 0
    if padding == "valid":
        padding = 0
    q_x = oracle.codes(values, s_x, xq.q_min, xq.q_max, z)
    options = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups}
    if not group:
        return torch.tensor(oracle.conv2d(q_x, z, s_x[0], q_w, s_w, bias, **options))
    # in groups: one convolution per group with the other codes at 0, added in float32 in order
    rows, scales = q_w.reshape(len(q_w), -1), s_w.reshape(len(q_w), -1)
    total: Any = np.float32(0)
    for g in range(rows.shape[1] // group):
        part = np.zeros_like(rows)
        part[:, g * group : (g + 1) * group] = rows[:, g * group : (g + 1) * group]
        total = total + oracle.conv2d(q_x, z, s_x[0], part.reshape(q_w.shape), scales[:, g], None, **options)
    return torch.tensor(total if bias is None else total + bias.reshape(1, -1, 1, 1))
