"""From integer codes to the output of a layer: the exact sum, then each float operation rounded once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lsquant.kernels import Conv, engine_for


def linear_of_codes(
    codes_x: Tensor, codes_w: Tensor, scale: Tensor, bias: Tensor | None, bound: int, group_size: int | None = None
) -> Tensor:
    """Multiply codes: ``y = fl(fl(acc * scale) + b)`` with ``acc`` the exact sum over integers.

    With groups, the scaled sums of the groups are added in float32 in their order.

    codes_x: (..., in) float32 integers, z subtracted.
    codes_w: (out, in) float32 integers.
    scale: (1,) or (out,) float32, ``fl(s_x * s_w)``; with groups (out, in / group_size).
    bias: (out,), float, or None.
    bound: the largest possible ``sum |q_x||q_w|`` of one sum.
    Returns: (..., out) float32.
    """
    sums = engine_for(codes_x.device.type).linear_sums
    if group_size is None:
        y = sums(codes_x, codes_w, bound).mul_(scale)
    else:
        parts = zip(codes_x.split(group_size, -1), codes_w.split(group_size, 1), scale.unbind(1), strict=True)
        qx, qw, m = next(parts)
        y = sums(qx, qw, bound).mul_(m)
        for qx, qw, m in parts:
            y.add_(sums(qx, qw, bound).mul_(m))
    return y if bias is None else y.add_(bias.to(torch.float32))


def convolution_of_codes(
    codes_x: Tensor,
    codes_w: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bound: int,
    conv: Conv,
    group_size: int | None = None,
) -> Tensor:
    """Convolve codes, N-d: as ``linear_of_codes``.

    With groups that share a step (2-d, not transposed) windows are unfolded into rows and multiplied as a linear
    layer's, one group of the convolution after the other.

    codes_x: (batch, in, *spatial) float32 integers, z subtracted.
    codes_w: rows (out, in / groups, *kernel) float32 integers, also when transposed.
    scale: (1,) or (out,) float32; with groups that share a step (out * in / groups * kernel / group_size,).
    bias, bound: see ``linear_of_codes``.
    Returns: (batch, out, *spatial) float32.
    """
    if group_size is not None:
        return _convolution_by_groups(codes_x, codes_w, scale, bias, bound, conv, group_size)
    y = engine_for(codes_x.device.type).convolution_sums(codes_x, conv.weight_of(codes_w), bound, conv)
    shape = [-1] + [1] * (y.dim() - 2)
    y.mul_(scale.reshape(shape))
    return y if bias is None else y.add_(bias.to(torch.float32).reshape(shape))


def _convolution_by_groups(
    codes_x: Tensor, codes_w: Tensor, scale: Tensor, bias: Tensor | None, bound: int, conv: Conv, group_size: int
) -> Tensor:
    kernel = codes_w.shape[2:]
    rows = F.unfold(codes_x, tuple(kernel), tuple(conv.dilation), tuple(conv.padding), tuple(conv.stride))
    rows = rows.transpose(1, 2)
    scales = scale.reshape(codes_w.shape[0], -1).chunk(conv.groups)
    parts = zip(rows.chunk(conv.groups, -1), codes_w.flatten(1).chunk(conv.groups), scales, strict=True)
    y = torch.cat([linear_of_codes(qx, qw, m, None, bound, group_size) for qx, qw, m in parts], -1)
    if bias is not None:
        y.add_(bias.to(torch.float32))
    spans = zip(codes_x.shape[2:], kernel, conv.stride, conv.padding, conv.dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spans]
    return y.transpose(1, 2).reshape(codes_x.shape[0], codes_w.shape[0], *size)
