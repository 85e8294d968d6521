"""From integer codes to the output of a layer: the exact sum, then each float operation rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lsquant.kernels import engine


def linear_of_codes(
    codes_x: Tensor, codes_w: Tensor, scale: Tensor, bias: Tensor | None, bound: int, group_size: int | None = None
) -> Tensor:
    """``y = fl(fl(acc * scale) + b)`` with ``acc`` the exact sum over integers.

    codes_x: (..., in) float32 integers, z subtracted.  codes_w: (out, in) float32 integers.
    scale: ``fl(s_x * s_w)``, (1,) or (out,); with groups (out, in / group_size), and the sums of the groups are added
    in float32 in their order.  bound: largest possible ``sum |q_x||q_w|`` of one sum.  Returns (..., out) float32.
    """
    sums = engine(codes_x.device.type).linear_sums
    if group_size is None:
        y = sums(codes_x, codes_w, bound).mul_(scale)
    else:
        parts = zip(codes_x.split(group_size, -1), codes_w.split(group_size, 1), scale.unbind(1), strict=True)
        qx, qw, m = next(parts)
        y = sums(qx, qw, bound).mul_(m)
        for qx, qw, m in parts:
            y.add_(sums(qx, qw, bound).mul_(m))
    return y if bias is None else y.add_(bias.to(torch.float32))


def exchanged(t: Tensor, groups: int) -> Tensor:
    """Rows (out, in / groups, ...) from a transposed convolution's weight (in, out / groups, ...), and back."""
    return t.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def arranged(rows: Tensor, conv: Sequence[Any]) -> Tensor:
    """A convolution's weight from rows (out, in / groups, *kernel), or rows from it.

    conv: stride, padding, dilation, transposed, output_padding, groups.
    """
    _, _, _, transposed, _, groups = conv
    return exchanged(rows, groups) if transposed else rows


def convolution_of_codes(
    codes_x: Tensor, codes_w: Tensor, scale: Tensor, bias: Tensor | None, bound: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    group_size: int | None = None,
) -> Tensor:  # fmt: skip
    """As ``linear_of_codes`` for an N-d convolution.  codes_x: (batch, channels, *spatial); scale: (1,) or (out,).

    codes_w: rows (out, in / groups, *kernel), also when transposed.  With group_size (2-d, not transposed) windows are
    unfolded into rows and multiplied as a linear layer's, one conv group after the other; scale is then
    (out * in / groups * kernel / group_size,).
    """
    if group_size is not None:
        windows = (tuple(codes_w.shape[2:]), tuple(dilation), tuple(padding), tuple(stride))
        rows = F.unfold(codes_x, *windows).transpose(1, 2)
        scales = scale.reshape(codes_w.shape[0], -1).chunk(groups)
        parts = zip(rows.chunk(groups, -1), codes_w.flatten(1).chunk(groups), scales, strict=True)
        y = torch.cat([linear_of_codes(qx, qw, m, None, bound, group_size) for qx, qw, m in parts], -1)
        if bias is not None:
            y.add_(bias.to(torch.float32))
        spans = zip(codes_x.shape[2:], codes_w.shape[2:], stride, padding, dilation, strict=True)
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spans]
        return y.transpose(1, 2).reshape(codes_x.shape[0], codes_w.shape[0], *size)
    conv = (stride, padding, dilation, transposed, output_padding, groups)
    y = engine(codes_x.device.type).convolution_sums(codes_x, arranged(codes_w, conv), bound, *conv)
    shape = [-1] + [1] * (y.dim() - 2)
    y.mul_(scale.reshape(shape))
    return y if bias is None else y.add_(bias.to(torch.float32).reshape(shape))
