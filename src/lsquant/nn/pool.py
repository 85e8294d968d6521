"""Average pooling in a fixed order, so that a runtime can repeat it bit for bit: rows, columns, one division.

In eval mode (and without gradients) the same float operations in the same order run in PyTorch and in the exported
graph, where they are Slice, Add and Div.  Training with gradients uses PyTorch's own kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant._util.leaf import leaf
from lsquant.nn.exact import ExactLayer

Windows = list[tuple[int, int]]
WINDOWS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def window_sums(x: Tensor, dim: int, windows: Windows) -> Tensor:
    """Return sums of x over the half-open windows of one dimension, each from left to right."""
    lengths = {end - start for start, end in windows}
    strides = {b[0] - a[0] for a, b in pairwise(windows)} or {1}
    if len(lengths) == len(strides) == 1 and 0 not in strides:  # 0: more windows than elements
        first, stride = windows[0][0], strides.pop()
        span = windows[-1][0] - first + 1
        parts = [_slice(x, dim, first + i, first + i + span, stride) for i in range(lengths.pop())]
        return _add_up(parts)
    return torch.cat([_add_up([_slice(x, dim, i, i + 1, 1) for i in range(*w)]) for w in windows], dim)


def _slice(x: Tensor, dim: int, start: int, end: int, stride: int) -> Tensor:
    index: list[slice] = [slice(None)] * x.dim()
    index[dim] = slice(start, end, stride)
    return x[tuple(index)]


def _add_up(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def exact_average(x: Tensor, windows: Sequence[Windows], counts: Tensor | int) -> Tensor:
    """Compute ``fl(sum / count)`` over boxes, one list of windows per trailing dimension.  Returns the dtype of x.

    Computed in float32, and in float64 for a float64 x.
    """
    y = x if x.dtype == torch.float64 else x.to(torch.float32)
    for dim, one in zip(range(x.dim() - len(windows), x.dim()), windows, strict=True):
        y = window_sums(y, dim, one)
    return (y / counts).to(x.dtype)


def sizes_of(value: Any, n: int) -> tuple[Any, ...] | None:
    """Return one entry per dimension, from a number, or a tuple or list of one entry or n; None for another length."""
    entries = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return entries * n if len(entries) == 1 else entries if len(entries) == n else None


def _box_counts(per_dim: list[list[int]], device: torch.device) -> Tensor | int:
    """Return the number of elements of each box: an int where it is the same for all."""
    counts = torch.ones((), dtype=torch.float32, device=device)
    for sizes in per_dim:
        counts = counts.unsqueeze(-1) * torch.tensor(sizes, dtype=torch.float32, device=device)
    same = all(len(set(sizes)) == 1 for sizes in per_dim)
    return torch.Size([sizes[0] for sizes in per_dim]).numel() if same else counts


class _AvgPool(ExactLayer):
    """Average pooling over the last ``dims`` dimensions with a fixed order of additions in eval mode."""

    kernel_size: Any
    stride: Any
    padding: Any
    count_include_pad: bool
    divisor_override: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return leaf(self, input)
        n = self.dims
        kernel, padding = sizes_of(self.kernel_size, n), sizes_of(self.padding, n)
        stride = kernel if self.stride in (None, (), []) else sizes_of(self.stride, n)
        if (self.training and torch.is_grad_enabled()) or None in (kernel, padding, stride):
            return super().forward(input)
        assert kernel is not None
        assert padding is not None
        assert stride is not None
        if not self._fits(input, kernel, padding, stride):
            return super().forward(input)  # which raises
        x = F.pad(input, [p for p in reversed(padding) for _ in range(2)]) if any(padding) else input
        windows, counts = [], []
        for k, s, p, size in zip(kernel, stride, padding, input.shape[-n:], strict=True):
            starts = range(0, size + 2 * p - k + 1, s)
            windows.append([(i, i + k) for i in starts])
            counts.append([k if self.count_include_pad else min(i + k, size + p) - max(i, p) for i in starts])
        divisor = self.divisor_override
        return exact_average(x, windows, _box_counts(counts, x.device) if divisor is None else divisor)

    def _fits(self, x: Tensor, kernel: tuple[Any, ...], padding: tuple[Any, ...], stride: tuple[Any, ...]) -> bool:
        """Tell whether torch's own layer takes such an input: one box at least, padded by half a kernel at most."""
        if x.dim() not in (self.dims + 1, self.dims + 2) or not x.is_floating_point() or self.divisor_override == 0:
            return False
        sides = zip(x.shape[-self.dims :], kernel, padding, stride, strict=True)
        return all(0 <= 2 * p <= k <= n + 2 * p and s > 0 for n, k, p, s in sides)

    @staticmethod
    def unsupported(layer: nn.Module) -> str:
        return "ceil_mode=True has no exact form here" if getattr(layer, "ceil_mode", False) else ""


def is_windowed(module: Any) -> bool:
    """Tell whether a module averages over windows of a given size."""
    return isinstance(module, WINDOWS)


def window_geometry(pool: Any) -> tuple[list[int], list[int], list[int]]:
    """Return (kernel, stride, padding) of a module that averages over windows, an entry per dimension."""
    dims = 1 + [isinstance(pool, kind) for kind in WINDOWS].index(True)
    stride: Any = pool.kernel_size if pool.stride in (None, (), []) else pool.stride
    given: list[Any] = [sizes_of(value, dims) for value in (pool.kernel_size, stride, pool.padding)]
    kernel, strides, padding = map(list, given)
    return kernel, strides, padding


def window_size(pool: Any) -> int:
    """Return the number of positions of a window."""
    return torch.Size(window_geometry(pool)[0]).numel()


def window_means(pool: Any, x: Tensor) -> Tensor:
    """Return the mean of every window, as PyTorch's own kernel computes it."""
    return pool.float_type.forward(pool, x)


class _AdaptiveAvgPool(ExactLayer):
    """Adaptive average pooling over the last ``dims`` dimensions with a fixed order of additions in eval mode."""

    output_size: Any

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return leaf(self, input)
        is_one = not isinstance(self.output_size, (tuple, list))
        wanted = (self.output_size,) * self.dims if is_one else tuple(self.output_size)
        if (self.training and torch.is_grad_enabled()) or not self._fits(input, wanted):
            return super().forward(input)  # which raises where it does not fit
        windows = []
        for size, out in zip(input.shape[-self.dims :], wanted, strict=True):
            n = size if out is None else int(out)
            windows.append([(i * size // n, -(-(i + 1) * size // n)) for i in range(n)])
        counts = _box_counts([[end - start for start, end in one] for one in windows], input.device)
        return exact_average(input, windows, counts)

    def _fits(self, x: Tensor, wanted: tuple[Any, ...]) -> bool:
        """Tell whether torch's own layer takes such an input."""
        if self.output_size is None or len(wanted) != self.dims or 0 in wanted:
            return False
        return x.dim() in (self.dims + 1, self.dims + 2) and 0 not in x.shape[1:] and x.is_floating_point()


class ExactAvgPool1d(_AvgPool, nn.AvgPool1d):
    """``nn.AvgPool1d`` with a fixed order of additions in eval mode."""

    float_type, dims = nn.AvgPool1d, 1


class ExactAvgPool2d(_AvgPool, nn.AvgPool2d):
    """``nn.AvgPool2d`` with a fixed order of additions in eval mode.  x: (..., height, width)."""

    float_type, dims = nn.AvgPool2d, 2


class ExactAvgPool3d(_AvgPool, nn.AvgPool3d):
    """``nn.AvgPool3d`` with a fixed order of additions in eval mode."""

    float_type, dims = nn.AvgPool3d, 3


class ExactAdaptiveAvgPool1d(_AdaptiveAvgPool, nn.AdaptiveAvgPool1d):
    """``nn.AdaptiveAvgPool1d`` with a fixed order of additions in eval mode."""

    float_type, dims = nn.AdaptiveAvgPool1d, 1


class ExactAdaptiveAvgPool2d(_AdaptiveAvgPool, nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` with a fixed order of additions in eval mode.  x: (..., height, width)."""

    float_type, dims = nn.AdaptiveAvgPool2d, 2


class ExactAdaptiveAvgPool3d(_AdaptiveAvgPool, nn.AdaptiveAvgPool3d):
    """``nn.AdaptiveAvgPool3d`` with a fixed order of additions in eval mode."""

    float_type, dims = nn.AdaptiveAvgPool3d, 3
