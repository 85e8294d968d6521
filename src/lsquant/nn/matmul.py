"""Quantized Linear, convolutions and transposed convolutions of one to three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lsquant import ops
from lsquant._util.errors import UsageError
from lsquant._util.leaf import leaf
from lsquant.nn.base import QuantizedLayer
from lsquant.nn.layout import WeightLayout


class QuantLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with learned steps: ``y = fl(fl(acc * fl(s_x s_w)) + b)``, ``acc`` the exact integer sum.

    x: (..., in_features).  Returns (..., out_features) in x's dtype.
    """

    float_type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return leaf(self, input)
        self.require_size(input.shape[-1], self.in_features)
        x, grids = self.read(input), self.grids()
        if grids is None:
            x, weight = self.float_operands(x)
            return F.linear(x, weight, self.bias)
        self.count_guarded()
        x_grid, w_grid = grids
        return self.computed(ops.linear, x, self.weight, self.bias, x_grid, w_grid)


class _QuantConv(QuantizedLayer):
    """The forward pass of all convolutions."""

    takes_groups = False

    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    groups: int

    def padding_sides(self) -> list[tuple[int, int]]:
        """Return (before, after) of the padding by spatial dimension."""
        if not isinstance(self.padding, str):
            return [(p, p) for p in self.padding]
        total = [d * (k - 1) if self.padding == "same" else 0
                 for d, k in zip(self.dilation, self.kernel_size, strict=True)]  # fmt: skip
        return [(t // 2, t - t // 2) for t in total]

    def padded(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """Return the input, padded where the op cannot do it, and the zero padding that is left to the op."""
        sides = self.padding_sides()
        if self.padding_mode == "zeros" and all(left == right for left, right in sides):
            return x, [left for left, _ in sides]
        flat = [side for pair in reversed(sides) for side in pair]
        return F.pad(x, flat, "constant" if self.padding_mode == "zeros" else self.padding_mode), [0] * len(sides)

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return leaf(self, input)
        batched = input.dim() == self.weight.dim()
        x, padding = self.padded(input if batched else input.unsqueeze(0))
        y = self.convolve(x, padding, False, (0,) * len(padding))
        return y if batched else y.squeeze(0)

    def convolve(self, x: Tensor, padding: Sequence[int], transposed: bool, output_padding: Sequence[int]) -> Tensor:
        """Convolve over exact integer sums, or in floating point where only one side is quantized."""
        self.require_size(x.shape[1], self.in_channels)
        x, grids = self.read(x), self.grids()
        conv = ops.Conv(self.stride, padding, self.dilation, transposed, output_padding, self.groups)
        if grids is None:
            values, weight = self.float_operands(x)
            return conv.convolve(values, weight, self.bias)
        self.count_guarded()
        x_grid, w_grid = grids
        return self.computed(ops.convolution, x, self.rows(), self.bias, x_grid, w_grid, conv)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """``nn.Conv1d`` with learned steps; see QuantConv2d.  x: (batch, in_channels, length) or without batch."""

    float_type = nn.Conv1d


class QuantConv2d(_QuantConv, nn.Conv2d):
    """``nn.Conv2d`` with learned steps: ``y = fl(fl(acc * fl(s_x s_w)) + b)``; padding is the zero point in code space.

    x: (batch, in_channels, height, width) or without batch.  Returns x's dtype and memory format.
    """

    float_type = nn.Conv2d
    takes_groups = True


class QuantConv3d(_QuantConv, nn.Conv3d):
    """``nn.Conv3d`` with learned steps; see QuantConv2d.  x: (batch, in_channels, *three) or without batch."""

    float_type = nn.Conv3d


class _QuantConvTranspose(_QuantConv):
    """The forward pass of transposed convolutions."""

    weight_layout = WeightLayout.INPUT_FIRST

    output_padding: tuple[int, ...]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not isinstance(input, Tensor):
            return leaf(self, input, output_size)
        batched = input.dim() == self.weight.dim()
        x = input if batched else input.unsqueeze(0)
        y = self.convolve(x, self._pads(), True, output_padding(self, x, output_size))
        return y if batched else y.squeeze(0)

    def _pads(self) -> tuple[int, ...]:
        return tuple(int(p) for p in self.padding)


def output_padding(layer: Any, x: Tensor, output_size: list[int] | None) -> Sequence[int]:
    """Return a transposed convolution's own output padding, or that which reaches ``output_size``.

    Raises: UsageError for a size out of reach.
    """
    if output_size is None:
        return layer.output_padding
    wanted = list(output_size)[-(x.dim() - 2) :]
    pads = [p if isinstance(p, int) else p[0] for p in layer.padding]
    geometry = zip(x.shape[2:], layer.stride, pads, layer.dilation, layer.kernel_size, strict=True)
    least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in geometry]
    extra = [w - n for w, n in zip(wanted, least, strict=True)]
    if any(not 0 <= e < s for e, s in zip(extra, layer.stride, strict=True)):
        raise UsageError(f"output_size={wanted} is out of reach, the smallest is {least}, stride {layer.stride}")
    return extra


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with learned steps; a channel is an output channel."""

    float_type = nn.ConvTranspose1d


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with learned steps; a channel is an output channel."""

    float_type = nn.ConvTranspose2d


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with learned steps; a channel is an output channel."""

    float_type = nn.ConvTranspose3d
