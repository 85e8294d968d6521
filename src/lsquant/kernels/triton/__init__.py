"""The Triton engine: the fused quantizer on CUDA, and linear layers over 8-bit codes by ``torch._int_mm``.

Under TRITON_INTERPRET=1 Triton's interpreter runs the same kernels on CPU tensors: how they are tested without a GPU.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsquant import reference
from lsquant._util.errors import UsageError
from lsquant.kernels.engine import Engine, Grid

ACROSS = 128  # columns of a tile, at most; where steps go by row, the longest float32 chain of a sum
DOWN = 256  # rows of a tile, at most, where steps go by column: likewise
TILE = 2048  # elements of a tile, at most


def _arithmetic() -> Any:
    from lsquant.kernels.triton import arithmetic

    return arithmetic


class _Matrix(NamedTuple):
    """Elements in storage order as rows x columns, the step of one by its row (% steps) or column (// inner)."""

    rows: int
    columns: int
    count: int  # elements; fewer than rows x columns where one run was cut into rows
    steps: int
    inner: int
    by: str  # "tensor", "row" or "column"

    @property
    def tile(self) -> tuple[int, int]:
        across = _power(self.columns, 64 if self.by == "column" else ACROSS)
        return _power(self.rows, min(DOWN if self.by == "column" else TILE, TILE // across)), across

    @property
    def tiles(self) -> tuple[int, int]:
        return -(-self.rows // self.tile[0]), -(-self.columns // self.tile[1])


def _power(n: int, most: int) -> int:
    """Return the least power of two that is not below n, at most ``most``."""
    p = 1
    while p < n and p < most:  # also for the symbolic sizes of a trace
        p *= 2
    return p


def _matrix(x: Tensor, grid: Grid) -> _Matrix:
    """Return where the elements of a dense tensor have their step; groups lie along its row-major order."""
    steps, axis, group_size = grid.step.numel(), grid.axis, grid.group_size
    count, outer, inner = x.numel(), 1, group_size or 1
    if steps == 1:
        return _Matrix(-(-count // ACROSS), ACROSS, count, 1, 1, "tensor")
    if group_size is None and axis is not None:
        others = [(x.shape[d], x.stride(d)) for d in range(x.dim()) if d != axis % x.dim() and x.shape[d] > 1]
        outer = prod([size for size, stride in others if stride > x.stride(axis)])
        inner = count // (outer * steps)
    if outer == 1 or inner >= 32:
        return _Matrix(outer * steps, inner, count, steps, inner, "row")
    return _Matrix(outer, steps * inner, count, steps, inner, "column")


def _run(kernel: str, m: _Matrix, *args: Any, **constants: Any) -> None:
    """Launch on the device of the first tensor, products and sums not contracted; or let the compiler launch it."""
    if not (args[0].is_cuda or _arithmetic().INTERPRETED):
        raise UsageError(f"the engine triton is forced and computes on CUDA; a tensor is on {args[0].device}")
    launch, (rows, columns) = getattr(_arithmetic(), kernel)[(prod(m.tiles),)], m.tile
    places = (m.rows, m.columns, m.count, m.steps, m.inner)
    if torch.compiler.is_compiling():
        return launch(*args, *places, **constants, ROWS=rows, COLUMNS=columns)
    with torch.cuda.device_of(args[0]):
        return launch(*args, *places, **constants, ROWS=rows, COLUMNS=columns, enable_fp_fusion=False)


def _numbers(grid: Grid) -> tuple[Any, ...]:
    """Return a quantizer as the kernels take it: steps; zero points, or the one number for all; bounds."""
    zero = grid.zero_point
    if grid.offset is not None:
        zero = reference.zero_point(grid.step, grid.offset, grid.q_min, grid.q_max)
    single = 0.0 if isinstance(zero, Tensor) else float(zero or 0)
    zeros = zero.to(torch.float32).contiguous() if isinstance(zero, Tensor) else None
    return grid.step.contiguous(), zeros, single, float(grid.q_min), float(grid.q_max)


def _dense(x: Tensor, grid: Grid) -> Tensor:
    """Return x without gaps, row-major for groups.  Raises: UsageError where the shapes do not fit."""
    x = x if grid.group_size is None else x.contiguous()
    reference.require_bounds(grid.q_min, grid.q_max)
    reference.require_layout(x, grid.step, grid.axis, grid.group_size, grid.zero_point, grid.offset)
    return x if x.stride() == torch.empty_like(x, device="meta").stride() else torch.empty_like(x).copy_(x)


class TritonEngine(Engine):
    """The kernels of ``arithmetic.py``, launched over tiles."""

    name = "triton"

    def why_not(self) -> str:
        try:
            interpreted = _arithmetic().INTERPRETED
        except ImportError as error:
            return f"Triton, which comes with PyTorch for CUDA, is not installed ({error})"
        return "" if interpreted or torch.cuda.is_available() else "there is no CUDA device"

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        x = _dense(x, grid)
        y = torch.empty_like(x)
        if x.numel():
            m = _matrix(x, grid)
            _run("forward", m, x, y, None, 0.0, *_numbers(grid), BY=m.by)
        return y

    def quantize_backward(
        self, grad: Tensor, x: Tensor, grid: Grid, reuse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x = _dense(x, grid)
        if grad.stride() != x.stride():
            grad, reuse = torch.empty_like(x, dtype=grad.dtype).copy_(grad), True
        to = grad if reuse and grad.dtype == x.dtype else torch.empty_like(x)
        learned = grid.offset is not None
        if not x.numel():
            return to, torch.zeros_like(grid.step), torch.zeros_like(grid.step) if learned else None
        m = _matrix(x, grid)
        (down, across), columns, kinds = m.tiles, m.by == "column", 2 if learned else 1
        partial = (kinds, down * m.columns if columns else m.rows * across)
        sums = torch.empty(partial, dtype=torch.float32, device=x.device)
        flags = {"BY": m.by, "LEARNED": learned, "IN_PLACE": to is grad}
        _run("backward", m, grad, x, to, sums, sums.shape[1], *_numbers(grid), **flags)
        terms = sums.view(kinds, -1, m.steps, m.inner if columns else across).sum((1, 3), dtype=torch.float64)
        by_step, *by_offset = (terms * grid.gradient_scale).to(torch.float32).unbind()
        return to, by_step, by_offset[0] if by_offset else None

    def linear(self, x: Tensor, x_grid: Grid, weight: Tensor, w_grid: Grid, bias: Tensor | None) -> Tensor | None:
        """Compute ``acc = sum (q_x - shift) q_w + (shift - z) sum q_w``, int32."""
        if not _fits(x, x_grid, weight, w_grid):
            return None
        shift, z = 128 if x_grid.q_max > 127 else 0, 0
        if x_grid.offset is not None:
            zeros = reference.zero_point(x_grid.step, x_grid.offset, x_grid.q_min, x_grid.q_max)
            z = zeros.to(torch.int32)
        qx, bad = _codes(x.reshape(-1, weight.shape[1]).contiguous(), shift, x_grid)
        qw, bad_w = _codes(weight.contiguous(), 0, w_grid)
        more = (shift - z) * qw.sum(1, dtype=torch.int32) if shift or x_grid.offset is not None else None
        y = torch.empty((qx.shape[0], qw.shape[0]), dtype=torch.float32, device=x.device)
        m = _Matrix(y.shape[0], y.shape[1], y.numel(), 1, 1, "tensor")
        scale = x_grid.step * w_grid.step + bad_w
        _run("finish", m, torch.ops.aten._int_mm(qx, qw.t()), more, bad, scale, bias, y)
        return y.view(*x.shape[:-1], qw.shape[0])


def _fits(x: Tensor, x_grid: Grid, weight: Tensor, w_grid: Grid) -> bool:
    """Tell whether ``torch._int_mm`` takes the shapes (on CPU it may saturate), codes fit int8 and sums int32."""
    if w_grid.group_size is not None:
        return False
    out, inputs = weight.shape
    levels = x_grid.q_max - x_grid.q_min
    narrow = levels < 256 and w_grid.q_min >= -128 and w_grid.q_max < 128
    narrow = narrow and inputs * levels * w_grid.largest_code < 2**30
    return narrow and x.is_cuda and weight.numel() > 0 and out % 8 == inputs % 8 == 0 and x.numel() // inputs > 16


def _codes(x: Tensor, shift: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Compute ``q - shift`` of x: (rows, columns), int8; and per row 0, or NaN where a part of it is not finite."""
    steps = grid.step.numel()
    m = _Matrix(x.shape[0], x.shape[1], x.numel(), steps, 1, "tensor" if steps == 1 else "row")
    q = torch.empty_like(x, dtype=torch.int8)
    bad = torch.empty((m.rows, m.tiles[1]), dtype=torch.float32, device=x.device)
    _run("forward", m, x, q, bad, float(shift), *_numbers(grid), BY=m.by)
    return q, bad.sum(1)


ENGINE = TritonEngine()
