"""Quantized Linear and Conv2d."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lsquant import ops
from lsquant.nn.base import QuantizedLayer


class QuantLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with learned steps: ``y = fl(fl(acc * fl(s_x s_w)) + b)``, ``acc`` the exact integer sum.

    x: (..., in_features).  Returns (..., out_features) in x's dtype.
    """

    float_type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        grids = self.grids()
        if grids is None:
            return F.linear(*self.float_operands(input), self.bias)
        group_size = self.weight_quantizer.spec.group_size if self.weight_quantizer is not None else None
        return ops.linear(input, self.weight, self.bias, *grids, group_size)

    def input_features(self, x: Tensor) -> int:
        return x.shape[-1]


class _QuantConv(QuantizedLayer):
    """The forward pass of all convolutions."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    groups: int
    function: Any

    def padded(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """The input, padded where the op cannot do it, and the zero padding that is left to the op."""
        if isinstance(self.padding, str):
            total = [d * (k - 1) if self.padding == "same" else 0
                     for d, k in zip(self.dilation, self.kernel_size, strict=True)]  # fmt: skip
            sides = [(t // 2, t - t // 2) for t in total]
        else:
            sides = [(p, p) for p in self.padding]
        if self.padding_mode == "zeros" and all(left == right for left, right in sides):
            return x, [left for left, _ in sides]
        flat = [side for pair in reversed(sides) for side in pair]
        return F.pad(x, flat, "constant" if self.padding_mode == "zeros" else self.padding_mode), [0] * len(sides)

    def forward(self, input: Tensor) -> Tensor:
        batched = input.dim() == self.weight.dim()
        x, padding = self.padded(input if batched else input.unsqueeze(0))
        grids = self.grids()
        if grids is None:
            y = self.function(*self.float_operands(x), self.bias, self.stride, padding, self.dilation, self.groups)
        else:
            group_size = self.weight_quantizer.spec.group_size if self.weight_quantizer is not None else None
            y = ops.convolution(
                x,
                self.weight,
                self.bias,
                *grids,
                stride=list(self.stride),
                padding=padding,
                dilation=list(self.dilation),
                groups=self.groups,
                group_size=group_size,
            )
        return y if batched else y.squeeze(0)

    def input_features(self, x: Tensor) -> int:
        shape = x.shape[1:] if x.dim() == self.weight.dim() else x.shape
        return shape.numel()


class QuantConv2d(_QuantConv, nn.Conv2d):
    """``nn.Conv2d`` with learned steps: ``y = fl(fl(acc * fl(s_x s_w)) + b)``; padding is the zero point in code space.

    x: (batch, in_channels, height, width) or without batch.  Returns x's dtype and memory format.
    """

    float_type = nn.Conv2d
    function = staticmethod(F.conv2d)
