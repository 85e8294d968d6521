"""The eager engine: the quantizer from ``lsquant.reference``, and exact integer sums by floating point over codes.

A sum of integers is exact in float32 while ``sum |q_x||q_w| < 2^24`` whatever the order of additions, and in float64
below 2^53.  Convolutions may be computed by Winograd or FFT (NNPACK, cuDNN), which divide and multiply on the way:
below 2^20 their error is far under one half and rounding gives the integer; above it float64 is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lsquant import reference
from lsquant.reference import quantize as quantize

DIRECT_LIMIT = 2**24
TRANSFORM_LIMIT = 2**20


def why_not() -> str:
    """Why this engine cannot run: it always can."""
    return ""


def quantize_backward(*args: Any, reuse: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``lsquant.reference.quantize_backward``; ``reuse`` (of the gradient's memory) is an offer not taken here."""
    return reference.quantize_backward(*args)


def linear_sums(codes_x: Tensor, codes_w: Tensor, bound: int) -> Tensor:
    """``acc = float32(sum_k x[..., k] w[o, k])``; bound: the largest possible ``sum |q_x||q_w|``.

    codes_x: (..., in) float32 integers (z already subtracted); codes_w: (out, in) float32.  Returns (..., out) float32.
    """
    if bound < DIRECT_LIMIT:
        return F.linear(codes_x, codes_w).add_(0.0)  # an integer sum has no -0
    return F.linear(codes_x.double(), codes_w.double()).to(torch.float32).add_(0.0)


def convolution_sums(
    codes_x: Tensor,
    codes_w: Tensor,
    bound: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """``acc`` of an N-d (transposed) convolution; padding is 0, which is z in code space.  Returns float32."""
    args = (None, stride, padding, dilation, transposed, output_padding, groups)
    if bound < TRANSFORM_LIMIT:
        return torch.convolution(codes_x, codes_w, *args).round_().add_(0.0)
    return torch.convolution(codes_x.double(), codes_w.double(), *args).to(torch.float32).add_(0.0)
