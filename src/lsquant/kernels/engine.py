"""The contract of an engine, and the records that say what it computes: `Grid` (one quantizer) and `Conv` (geometry).

An engine brings a quantizer.  Everything else has a default in plain PyTorch: a method that returns None leaves the
work to floating point over codes, which gives the same sums of integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DIRECT_LIMIT = 2**24
"""Below it a sum of integers is exact in float32, whatever the order of additions."""

TRANSFORM_LIMIT = 2**20
"""Below it a convolution by Winograd or FFT in float32 is off by far less than one half, so rounding is exact."""


class Grid(NamedTuple):
    """One quantizer, as engines and operators take it.

    A named tuple, because one is made per quantizer and forward pass: a frozen dataclass takes four times as long.

    step: (steps,) float32, > 0, the guard applied; one for the tensor, per index of ``axis`` or per group.
    q_min, q_max: lowest and highest code.
    gradient_scale: g, multiplies the gradients of step and offset.
    offset: (steps,) float32 or None, LSQ+'s learned b.
    zero_point: the fixed integer z, (steps,) int of them, or None for 0; at most one of offset and zero_point.
    axis: the dimension that has a step per index, or None.
    group_size: neighbours along the dimensions after the first, row-major, that share a step, or None.
    """

    step: Tensor
    q_min: int
    q_max: int
    gradient_scale: float = 1.0
    offset: Tensor | None = None
    zero_point: int | Tensor | None = None
    axis: int | None = None
    group_size: int | None = None

    @property
    def largest_code(self) -> int:
        """The largest possible ``|q - z|``; the whole range where z is learned or given per step."""
        if self.offset is not None or isinstance(self.zero_point, Tensor):
            return self.q_max - self.q_min
        z = self.zero_point or 0
        return max(abs(self.q_min - z), abs(self.q_max - z))


class Conv(NamedTuple):
    """The geometry of an N-d convolution, one number per spatial dimension in each list.

    padding: zeros on both sides, which is z in code space.
    transposed: whether the weight is (in, out / groups, *kernel) and inputs are spread over outputs.
    output_padding: added to one side of a transposed convolution's output.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool = False
    output_padding: Sequence[int] = ()
    groups: int = 1

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution of this geometry; weight: the layer's own layout.

        By the functions that autocast knows: ``torch.convolution`` it does not, on a CPU.
        """
        which = len(self.stride) - 1
        if self.transposed:
            function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[which]
            return function(x, weight, bias, self.stride, self.padding, self._extra, self.groups, self.dilation)
        function = (F.conv1d, F.conv2d, F.conv3d)[which]
        return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the wanted gradients of x and weight; x gives only its shape where the weight's is not wanted."""
        if self.transposed:  # PyTorch's kernel for dilated ones refuses a weight in channels last
            weight = weight.contiguous()
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, self.transposed, self._extra,
            self.groups, [of_x, of_weight, False],
        )  # fmt: skip
        return found[0], found[1]

    @property
    def _extra(self) -> Sequence[int]:
        return self.output_padding or [0] * len(self.stride)

    def weight_of(self, rows: Tensor) -> Tensor:
        """Return the weight in the layer's own layout from rows (out, in / groups, *kernel)."""
        return swap_channels(rows, self.groups) if self.transposed else rows

    def rows_of(self, weight: Tensor) -> Tensor:
        """Return rows (out, in / groups, *kernel) from a weight in the layer's own layout."""
        return swap_channels(weight, self.groups) if self.transposed else weight


def swap_channels(t: Tensor, groups: int) -> Tensor:
    """Turn (in, out / groups, ...) into (out, in / groups, ...), group by group.  Its own inverse."""
    return t.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


class Engine(ABC):
    """What an engine offers.  A subclass brings the first three methods and overrides what it does faster.

    name: the key in ``lsquant.kernels.ENGINES``.
    """

    name: str

    @abstractmethod
    def why_not(self) -> str:
        """Say why this engine cannot run here; empty when it can.  Builds it where it has to be built."""

    @abstractmethod
    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        """Quantize and dequantize, in the shape and dtype of x.

        ``v_hat = (clip(round(x / s) + z, q_min, q_max) - z) * s``, (M3)

        x: any shape, float.
        Raises: UsageError where the grid's tensors do not fit x.
        """

    @abstractmethod
    def quantize_backward(
        self, grad: Tensor, x: Tensor, grid: Grid, reuse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the gradients of x, step and offset, the latter two times g: (M4) to (M6), (M10).

        grad: the shape of x, its dtype or float32.
        reuse: whether the memory of grad may become the result's.
        Returns: (the shape and dtype of x; (steps,) float32; (steps,) float32 or None without an offset).
        """

    def fake_quantize(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Compute as ``quantize``, with a derivative that is not written in Python; None where there is none."""
        return None

    def scale_shift(self, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        """Scale and shift each channel, in the dtype of x.

        ``fl(fl(x * alpha) + beta)``, two roundings

        x: (batch, C, ...), float.
        alpha, beta: (C,) float32.
        """
        y = (x.to(torch.float32) * per_channel(alpha, x)).add_(per_channel(beta, x))
        return y.to(x.dtype)

    def linear(self, x: Tensor, x_grid: Grid, weight: Tensor, w_grid: Grid, bias: Tensor | None) -> Tensor | None:
        """Compute a linear layer over codes; None where it does not fit.

        ``y = fl(fl(acc * fl(s_x s_w)) + b)``, ``acc`` the exact sum of ``(q_x - z) q_w``

        x: (..., in), float.
        weight: (out, in), float.
        bias: (out,), float, or None.
        Returns: (..., out) float32.
        """
        return None

    def convolution(
        self, x: Tensor, x_grid: Grid, rows: Tensor, w_grid: Grid, bias: Tensor | None, conv: Conv
    ) -> Tensor | None:
        """Compute as ``linear``, for an N-d convolution; None where it does not fit.

        x: (batch, in, *spatial), float.
        rows: (out, in / groups, *kernel), float, also when transposed.
        Returns: (batch, out, *spatial) float32.
        """
        return None

    def weight_gradient(
        self, grad: Tensor, x: Tensor, x_grid: Grid, kernel: Sequence[int], conv: Conv
    ) -> Tensor | None:
        """Compute the gradient of a convolution's dequantized weight from its float input; None where it does not fit.

        grad: (batch, out, *spatial) float32.
        kernel: the weight's spatial size.
        Returns: (out, in / groups, *kernel) float32.
        """
        return None

    def input_gradient(self, grad: Tensor, x: Tensor, w_hat: Tensor, conv: Conv) -> Tensor | None:
        """Compute the gradient of a convolution's dequantized input; None where it does not fit.

        x: gives shape and memory format.
        w_hat: (out, in / groups, *kernel) float32, the dequantized weight.
        Returns: the shape of x, float32.
        """
        return None

    def linear_sums(self, codes_x: Tensor, codes_w: Tensor, bound: int) -> Tensor:
        """Sum products of codes exactly.

        ``acc = float32(sum_k x[..., k] w[o, k])``

        codes_x: (..., in) float32 integers, z subtracted.
        codes_w: (out, in) float32 integers.
        bound: the largest possible ``sum |q_x||q_w|``, below 2^53.
        Returns: (..., out) float32.
        """
        if bound < DIRECT_LIMIT:
            return F.linear(codes_x, codes_w).add_(0.0)  # an integer sum has no -0
        return F.linear(codes_x.double(), codes_w.double()).to(torch.float32).add_(0.0)

    def convolution_sums(self, codes_x: Tensor, codes_w: Tensor, bound: int, conv: Conv) -> Tensor:
        """Compute as ``linear_sums``, for an N-d convolution.

        A convolution may be computed by Winograd or FFT (NNPACK, cuDNN), which divide and multiply on the way.

        codes_x: (batch, in, *spatial) float32 integers, z subtracted.
        codes_w: in the layer's own layout, float32 integers.
        Returns: (batch, out, *spatial) float32.
        """
        if bound < TRANSFORM_LIMIT:
            return conv.convolve(codes_x, codes_w).round_().add_(0.0)
        return conv.convolve(codes_x.double(), codes_w.double()).to(torch.float32).add_(0.0)


def per_channel(t: Tensor, x: Tensor) -> Tensor:
    """Reshape (C,) so that it broadcasts over (batch, C, ...)."""
    return t.reshape([-1 if d == 1 else 1 for d in range(x.dim())])
