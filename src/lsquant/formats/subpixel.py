"""Transposed convolutions as ordinary ones: runtimes have integer kernels for those only.

With a stride s, the output at position ``s m + r`` is an ordinary convolution at m with the kernel's elements r, r + s,
r + 2 s, ...  So a transposed convolution is one with s times as many channels a dimension (a sub-pixel convolution,
arXiv:1609.05158), whose channels are then spread over space.  Every sum has the same products, and some more with 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.errors import UsageError
from lsquant.fusion.arithmetic import Folded


@dataclass(frozen=True)
class Spread:
    """What follows the ordinary convolution.

    block: the positions of each dimension that one position becomes; 1: nothing is spread.
    padding: (before, after) of the ordinary convolution, by dimension.
    kernel: its size.
    crop: (before, after), the positions that are then left out at the ends of each dimension.
    """

    block: int
    padding: list[tuple[int, int]]
    kernel: list[int]
    crop: list[tuple[int, int]]


def spread_of(layer: Any, name: str, caller: str) -> Spread | None:
    """Return what follows the ordinary convolution in the place of a layer; None for one that is not transposed.

    Raises: UsageError naming a transposed convolution without such a form.
    """
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return None
    stride = {int(s) for s in layer.stride}
    if len(stride) > 1 or len(layer.stride) > 2 or any(d != 1 for d in layer.dilation):
        raise UsageError(
            f"{name}: {caller} writes transposed convolutions of one or two dimensions with one stride and without "
            f"dilation; this one has {len(layer.stride)} dimensions, stride={layer.stride}, dilation={layer.dilation}"
        )
    s = stride.pop()
    kernel = [-(-k // s) for k in layer.kernel_size]
    padding, crop = [], []
    sides: Any = zip(layer.kernel_size, kernel, layer.padding, layer.output_padding, strict=True)
    for k, parts, p, more in sides:
        after = max(0, (k - p + more - 1) // s)
        padding.append((parts - 1, after))
        crop.append((p, s * (after + 1) + p - k - more))
    return Spread(s, padding, kernel, crop)


def as_written(layer: Any, folded: Folded, name: str, caller: str) -> Folded:
    """Return the constants of a layer as files hold them: codes in its own layout, or of the ordinary convolution."""
    spread = spread_of(layer, name, caller)
    if spread is None:
        return folded._replace(codes=layer.from_rows(folded.codes))
    rows, s, n = folded.codes, spread.block, len(spread.kernel)
    whole = torch.zeros(*rows.shape[:2], *(s * k for k in spread.kernel), dtype=rows.dtype, device=rows.device)
    whole[(..., *(slice(0, k) for k in rows.shape[2:]))] = rows
    times = s**n
    return folded._replace(
        codes=_phases(whole, s, spread.kernel), step=folded.step.repeat_interleave(times),
        bias=folded.bias.repeat_interleave(times),
    )  # fmt: skip


def _phases(rows: Tensor, s: int, kernel: list[int]) -> Tensor:
    """Return (out * s^n, in, *kernel): a channel for each remainder of the position by s, kernels reversed."""
    out, others, n = rows.shape[0], rows.shape[1], len(kernel)
    cut = rows.reshape(out, others, *(size for k in kernel for size in (k, s)))  # element r + s a at [a, r]
    order = [0, *range(3, 3 + 2 * n, 2), 1, *range(2, 2 + 2 * n, 2)]
    return cut.permute(order).flip(list(range(2 + n, 2 + 2 * n))).reshape(out * s**n, others, *kernel)
