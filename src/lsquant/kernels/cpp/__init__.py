"""The C++ engine: the fused quantizer, and layers over 8-bit codes, on torch's own threads.

Built at first use (``build.py``).  Functions that return None where they do not apply leave the work to floating point
over codes, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lsquant import reference
from lsquant.kernels.cpp.build import CannotBuild, library
from lsquant.kernels.eager import convolution_sums as convolution_sums
from lsquant.kernels.eager import linear_sums as linear_sums


@cache
def why_not() -> str:
    """Why this engine cannot run; empty when it can."""
    try:
        torch.ops.load_library(str(library()))
    except (CannotBuild, OSError, ImportError) as error:
        return str(error)
    torch.library.register_fake("lsquant_cpp::fake_quantize", lambda x, *rest: torch.empty_like(x))
    torch.library.register_fake("lsquant_cpp::fake_quantize_backward", _fake_backward)
    return ""


def _fake_backward(grad: Tensor, x: Tensor, step: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(step), step.new_empty(0) if rest[-1] is None else step.clone()


def fake_quantize(
    x: Tensor, step: Tensor, q_min: int, q_max: int, gradient_scale: float, axis: int | None, group_size: int | None,
    fixed_zero: int, zero_point: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    """The quantizer with its derivative registered in C++; arguments of ``lsquant::fake_quantize``."""
    reference.require_layout(x, step, axis, group_size, zero_point, offset)
    rest = (axis, group_size, fixed_zero, zero_point, offset)
    return torch.ops.lsquant_cpp.fake_quantize(x, step, q_min, q_max, gradient_scale, *rest)


def _split(zero_point: int | Tensor | None) -> tuple[int, Tensor | None]:
    return (0, zero_point) if isinstance(zero_point, Tensor) else (zero_point or 0, None)


def quantize(x: Tensor, step: Tensor, q_min: int, q_max: int, axis: int | None, group_size: int | None,
             zero_point: int | Tensor | None, offset: Tensor | None) -> Tensor:  # fmt: skip
    """See ``lsquant.reference.quantize``."""
    return fake_quantize(x, step, q_min, q_max, 1.0, axis, group_size, *_split(zero_point), offset)


def quantize_backward(
    grad: Tensor, x: Tensor, step: Tensor, q_min: int, q_max: int, gradient_scale: float, axis: int | None,
    group_size: int | None, zero_point: int | Tensor | None, offset: Tensor | None, reuse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """See ``lsquant.reference.quantize_backward``; with ``reuse`` the memory of grad may become the result's."""
    ops = torch.ops.lsquant_cpp
    op = ops.fake_quantize_backward_reusing if reuse else ops.fake_quantize_backward
    rest = (gradient_scale, axis, group_size, *_split(zero_point), offset)
    grad_x, grad_step, grad_offset = op(grad, x, step, q_min, q_max, *rest)
    return grad_x, grad_step, None if offset is None else grad_offset


def scale_shift(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``fl(fl(x * alpha) + beta)`` in x's dtype and strides.  x: (batch, C, ...); alpha, beta: (C,) float32."""
    return torch.ops.lsquant_cpp.scale_shift(x, alpha, beta)


def _fits(x: Tensor, weight: Tensor, x_min: int, x_max: int, w_min: int, w_max: int) -> bool:
    """Whether codes fit 8 bits and sums int32, with the correction of the shift."""
    top = (x_max - x_min) * max(abs(w_min), abs(w_max))
    return x_max - x_min < 256 and weight[0].numel() * top < 2**30 and x.numel() > 0


def linear(x: Tensor, x_step: Tensor, x_offset: Tensor | None, x_min: int, x_max: int, weight: Tensor, w_step: Tensor,
           w_min: int, w_max: int, bias: Tensor | None) -> Tensor | None:  # fmt: skip
    """``y = fl(fl(acc * fl(s_x s_w)) + b)`` float32, from float input (..., in) and weight (out, in)."""
    if not weight.numel() or not _fits(x, weight, x_min, x_max, w_min, w_max):
        return None
    return torch.ops.lsquant_cpp.linear(x, x_step, x_offset, x_min, x_max, weight, w_step, w_min, w_max, bias)


def _plain(x: Tensor, conv: Sequence[Any]) -> bool:
    """A 2-d convolution that is neither transposed nor grouped."""
    return x.dim() == 4 and not conv[3] and conv[5] == 1


def convolution(
    x: Tensor, x_step: Tensor, x_offset: Tensor | None, x_min: int, x_max: int, weight: Tensor, w_step: Tensor,
    w_min: int, w_max: int, bias: Tensor | None, conv: Sequence[Any],
) -> Tensor | None:  # fmt: skip
    """As ``linear`` for a 2-d convolution; conv: stride, padding, dilation, transposed, output_padding, groups."""
    if not (_plain(x, conv) and weight.numel() and _fits(x, weight, x_min, x_max, w_min, w_max)):
        return None
    grid = (x, x_step, x_offset, x_min, x_max, weight, w_step, w_min, w_max)
    return torch.ops.lsquant_cpp.convolution(*grid, bias, *conv[:3])


def weight_gradient(grad: Tensor, x: Tensor, x_step: Tensor, x_offset: Tensor | None, x_min: int, x_max: int,
                    weight: Tensor, conv: Sequence[Any]) -> Tensor | None:  # fmt: skip
    """The gradient of a convolution's dequantized weight, float32, from the float input; None where it does not fit."""
    if not (_plain(x, conv) and x.numel() and weight.numel() <= 2**17):
        return None
    kernel = list(weight.shape[2:])
    return torch.ops.lsquant_cpp.weight_gradient(grad, x, x_step, x_offset, x_min, x_max, kernel, *conv[:3])


def input_gradient(grad: Tensor, x: Tensor, w_hat: Tensor, conv: Sequence[Any]) -> Tensor | None:
    """The gradient of a convolution's dequantized input, float32, channels last; None where it does not fit.

    3x3, stride 1, at least 32 channels, by minimal filtering.
    """
    stride, padding, dilation = conv[:3]
    out, channels = w_hat.shape[:2]
    fits = _plain(x, conv) and w_hat.shape[2:] == (3, 3) and min(out, channels) >= 32 and w_hat.numel() <= 2**18
    if not fits or {*stride, *dilation} != {1} or max(padding) > 2 or out % 8 or not x.numel():
        return None
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    return torch.ops.lsquant_cpp.input_gradient(grad, w_hat, list(x.shape), padding)
