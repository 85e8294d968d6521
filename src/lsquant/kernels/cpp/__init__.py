"""The C++ engine: the fused quantizer, and layers over 8-bit codes, on torch's own threads.

Built at first use (``build.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsquant import reference
from lsquant._util.errors import UsageError
from lsquant.kernels.cpp.build import CannotBuild, library
from lsquant.kernels.engine import Conv, Engine, Grid

SUM_LIMIT = 2**30
"""Of a sum of codes in int32, with the correction of the shift."""


class CppEngine(Engine):
    """The operators ``lsquant_cpp::*``, whose arguments are flat: this class turns records into them."""

    name = "cpp"
    _reason: str | None = None

    def why_not(self) -> str:
        if self._reason is None:
            self._reason = _load()
        return self._reason

    def fake_quantize(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the quantizer with its derivative registered in C++."""
        step, zero, offset = grid.step, grid.zero_point, grid.offset
        reference.require_bounds(grid.q_min, grid.q_max)
        reference.require_layout(x, step, grid.axis, grid.group_size, zero, offset)
        fixed, zeros = (0, zero) if isinstance(zero, Tensor) else (zero or 0, None)
        return torch.ops.lsquant_cpp.fake_quantize(
            x, step, grid.q_min, grid.q_max, grid.gradient_scale, grid.axis, grid.group_size, fixed, zeros, offset
        )

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        return self.fake_quantize(x, grid)

    def quantize_backward(
        self, grad: Tensor, x: Tensor, grid: Grid, reuse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ops = torch.ops.lsquant_cpp
        backward = ops.fake_quantize_backward_reusing if reuse else ops.fake_quantize_backward
        zero, offset = grid.zero_point, grid.offset
        fixed, zeros = (0, zero) if isinstance(zero, Tensor) else (zero or 0, None)
        of_x, of_step, of_offset = backward(
            grad, x, grid.step, grid.q_min, grid.q_max, grid.gradient_scale, grid.axis, grid.group_size, fixed, zeros,
            offset,
        )  # fmt: skip
        return of_x, of_step, None if offset is None else of_offset

    def scale_shift(self, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return torch.ops.lsquant_cpp.scale_shift(x, alpha, beta)

    def linear(self, x: Tensor, x_grid: Grid, weight: Tensor, w_grid: Grid, bias: Tensor | None) -> Tensor | None:
        if not _fits(x, x_grid, weight, w_grid):
            return None
        return torch.ops.lsquant_cpp.linear(
            x, x_grid.step, x_grid.offset, x_grid.q_min, x_grid.q_max,
            weight, w_grid.step, w_grid.q_min, w_grid.q_max, bias,
        )  # fmt: skip

    def convolution(
        self, x: Tensor, x_grid: Grid, rows: Tensor, w_grid: Grid, bias: Tensor | None, conv: Conv
    ) -> Tensor | None:
        """Convolve in two dimensions, neither transposed nor grouped."""
        if not (_is_plain(x, conv) and _fits(x, x_grid, rows, w_grid)):
            return None
        return torch.ops.lsquant_cpp.convolution(
            x, x_grid.step, x_grid.offset, x_grid.q_min, x_grid.q_max,
            rows, w_grid.step, w_grid.q_min, w_grid.q_max, bias, conv.stride, conv.padding, conv.dilation,
        )  # fmt: skip

    def weight_gradient(
        self, grad: Tensor, x: Tensor, x_grid: Grid, kernel: Sequence[int], conv: Conv
    ) -> Tensor | None:
        """Compute it in two dimensions, neither transposed nor grouped, at most 2^17 weights."""
        weights = grad.shape[1] * x.shape[1] * torch.Size(kernel).numel()
        if not (_is_plain(x, conv) and x.numel() and 0 < weights <= 2**17):
            return None
        return torch.ops.lsquant_cpp.weight_gradient(
            grad, x, x_grid.step, x_grid.offset, x_grid.q_min, x_grid.q_max, kernel,
            conv.stride, conv.padding, conv.dilation,
        )  # fmt: skip

    def input_gradient(self, grad: Tensor, x: Tensor, w_hat: Tensor, conv: Conv) -> Tensor | None:
        """Compute it by minimal filtering: 3x3, stride 1, at least 32 channels, channels last as the result."""
        out, channels = w_hat.shape[:2]
        fits = _is_plain(x, conv) and w_hat.shape[2:] == (3, 3) and min(out, channels) >= 32 and out % 8 == 0
        if not fits or w_hat.numel() > 2**18 or not x.numel():  # minima above: the weight is not empty
            return None
        if {*conv.stride, *conv.dilation} != {1} or max(conv.padding) > 2:
            return None
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return None
        return torch.ops.lsquant_cpp.input_gradient(grad, w_hat, list(x.shape), conv.padding)


def _load() -> str:
    """Build and load the library; returns why that cannot be done, empty when it is."""
    try:
        torch.ops.load_library(str(library()))
    except (CannotBuild, OSError, ImportError) as error:
        return str(error)
    torch.library.register_fake("lsquant_cpp::fake_quantize", _fake_forward)
    torch.library.register_fake("lsquant_cpp::fake_quantize_backward", _fake_backward)
    return ""


def _fake_forward(x: Tensor, step: Tensor, q_min: int, q_max: int, *rest: Any) -> Tensor:
    _, axis, group_size, _, zero_point, offset = rest
    reference.require_bounds(q_min, q_max)
    reference.require_layout(x, step, axis, group_size, zero_point, offset)
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, x: Tensor, step: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _fake_forward(x, step, *rest)
    if grad.shape != x.shape or grad.device != x.device:
        raise UsageError(f"a gradient of {tuple(grad.shape)} on {grad.device} for {tuple(x.shape)} on {x.device}")
    *_, offset = rest
    return torch.empty_like(x), torch.empty_like(step), step.new_empty(0) if offset is None else step.clone()


def _fits(x: Tensor, x_grid: Grid, weight: Tensor, w_grid: Grid) -> bool:
    """Tell whether there are no groups, something to sum, codes of 8 bits (the weight's int8) and int32 sums."""
    levels = x_grid.q_max - x_grid.q_min
    if levels >= 256 or w_grid.group_size is not None or not x.numel() or not weight.numel():
        return False
    if w_grid.q_min < -128 or w_grid.q_max > 127:
        return False
    return weight.numel() // weight.shape[0] * levels * w_grid.largest_code < SUM_LIMIT


def _is_plain(x: Tensor, conv: Conv) -> bool:
    """Tell whether a convolution is 2-d and neither transposed nor grouped."""
    return x.dim() == 4 and not conv.transposed and conv.groups == 1


ENGINE = CppEngine()
