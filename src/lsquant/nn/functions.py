"""Modules that stand for functions for which ``torch.nn`` has none: clip, mean over space, slices, resizing."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant._util.errors import UsageError


class Clip(nn.Module):
    """Limit values to [min, max], as ``torch.clamp`` does; the gradient passes at the limits themselves.

    min, max: the limits; None: no limit on this side, but not on both.
    """

    def __init__(self, min: float | None = None, max: float | None = None) -> None:
        super().__init__()
        if min is None and max is None:
            raise UsageError("Clip: give min, max or both")
        self.min, self.max = min, max

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.min, self.max)

    def extra_repr(self) -> str:
        return f"min={self.min}, max={self.max}"


class Mean(nn.Module):
    """Average over dimensions: ``x.mean(dim, keepdim)``.

    dim: the dimensions; (2, 3), the default, is the space of an image.
    keepdim: whether they stay, with size 1.
    """

    def __init__(self, dim: int | Sequence[int] = (2, 3), keepdim: bool = False) -> None:
        super().__init__()
        self.dim = (dim,) if isinstance(dim, int) else tuple(dim)
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim, self.keepdim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, keepdim={self.keepdim}"


class Slice(nn.Module):
    """Take a part of a tensor: ``Slice(slice(None), slice(0, 4))(x)`` is ``x[:, 0:4]``.

    index: a slice, an integer or ``...`` for each dimension.
    """

    def __init__(self, *index: slice | int | EllipsisType) -> None:
        super().__init__()
        for part in index:
            if isinstance(part, bool) or not isinstance(part, (slice, int, EllipsisType)):
                raise UsageError(f"Slice: {part!r} is no slice, integer or '...'; use Slice(slice(None), slice(0, 4))")
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x[self.index]

    def extra_repr(self) -> str:
        return ", ".join(map(_spoken, self.index))


def _spoken(part: slice | int | EllipsisType) -> str:
    """Write a part of an index as it stands between brackets."""
    if not isinstance(part, slice):
        return "..." if part is ... else str(part)
    start, stop, step = ("" if p is None else str(p) for p in (part.start, part.stop, part.step))
    return f"{start}:{stop}" + (f":{step}" if step else "")


class Chunk(nn.Module):
    """Cut a tensor into a number of parts: ``x.chunk(chunks, dim)``, a tuple.

    chunks: how many.
    dim: along which dimension; 1, the default, is the channels.
    """

    def __init__(self, chunks: int, dim: int = 1) -> None:
        super().__init__()
        self.chunks, self.dim = chunks, dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(self.chunks, self.dim)

    def extra_repr(self) -> str:
        return f"{self.chunks}, dim={self.dim}"


class Split(nn.Module):
    """Cut a tensor into parts of given sizes: ``x.split(sizes, dim)``, a tuple.

    sizes: one size for all parts, or the size of each.
    dim: along which dimension; 1, the default, is the channels.
    """

    def __init__(self, sizes: int | Sequence[int], dim: int = 1) -> None:
        super().__init__()
        self.sizes = sizes if isinstance(sizes, int) else tuple(sizes)
        self.dim = dim

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, self.sizes if isinstance(self.sizes, int) else list(self.sizes), self.dim)

    def extra_repr(self) -> str:
        return f"{self.sizes}, dim={self.dim}"


class Resize(nn.Module):
    """Repeat or leave out pixels to reach a size that is known when it is called (``nn.Upsample`` has a fixed one).

    x: (N, C, ...), the image.
    size: the spatial size, as in ``resize(x, y.shape[2:])``.
    """

    def forward(self, x: Tensor, size: int | Sequence[int]) -> Tensor:
        return F.interpolate(x, size, mode="nearest")
