"""The arithmetic of the Triton engine.  docs/mathematics.md, (M2) to (M6) and (M10).

The elements in storage order are a matrix whose steps go by row or by column; one program works on one tile of it.
The same bits on a GPU and in Triton's interpreter: true divisions, half to even by exact additions, no atomics.
"""

# a call of a part of a kernel is taken for one that never returns:
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(rows, columns, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return row (ROWS, 1), column (1, COLUMNS) and place of this program's elements, and which of them exist."""
    program, across = tl.program_id(0).to(tl.int64), (columns + COLUMNS - 1) // COLUMNS
    r = program // across * ROWS + tl.arange(0, ROWS)[:, None]
    c = program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return r, c, r * columns + c, (r < rows) & (c < columns) & (r * columns + c < count)


@triton.jit
def _grid(step, zero, fixed, r, c, rows, columns, steps, inner, BY: tl.constexpr):
    """Return step and zero point: of the tensor, of every row or of every column."""
    index = r % steps if BY == "row" else c // inner if BY == "column" else 0
    there = r < rows if BY == "row" else c < columns if BY == "column" else True
    s = tl.load(step + index, mask=there, other=1.0)
    return s, fixed if zero is None else tl.load(zero + index, mask=there, other=0.0)


@triton.jit
def _rounded(v):
    """Round half to even, |v| <= 2^22: adding 1.5 * 2^23 rounds at the units.  Larger values stay large."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def _store(to, v, there):
    """Store in the type of the output, rounded half to even; bfloat16 by hand, as the interpreter truncates."""
    if to.dtype.element_ty == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    tl.store(to, v.to(to.dtype.element_ty), mask=there)


@triton.jit
def _sum(to, v, r, c, rows, columns, BY: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the tile's float32 sums; to: (rows, tiles across), where steps go by column (tiles down, columns)."""
    program, across = tl.program_id(0).to(tl.int64), (columns + COLUMNS - 1) // COLUMNS
    if BY == "column":
        tl.store(to + program // across * columns + c, tl.sum(v, axis=0, keep_dims=True), mask=c < columns)
    else:
        tl.store(to + r * across + program % across, tl.sum(v, axis=1, keep_dims=True), mask=r < rows)


@triton.jit
def forward(x, y, bad, shift, step, zero, fixed, q_min, q_max, rows, columns, count, steps, inner,
            BY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """(M3) Compute ``y = (code - z) s``, NaN where x is not finite.  With bad, int8 codes: ``y = code - shift``.

    bad: (rows, tiles across), NaN where the tile's part of a row is not finite, else 0.
    """
    r, c, at, there = _tile(rows, columns, count, ROWS, COLUMNS)
    s, z = _grid(step, zero, fixed, r, c, rows, columns, steps, inner, BY)
    v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    code = _rounded(tl.math.div_rn(v, s)) + z
    code = tl.where(code < q_min, q_min, code)  # a NaN stays one
    code = tl.where(code > q_max, q_max, code)
    code = tl.where(tl.abs(v) < float("inf"), code, float("nan"))
    if bad is None:
        _store(y + at, (code - z) * s, there)
    else:
        tl.store(y + at, tl.where(code == code, code - shift, 0.0).to(tl.int8), mask=there)
        _sum(bad, tl.where(there, code - code, 0.0), r, c, rows, columns, BY, COLUMNS)


@triton.jit
def backward(up, x, grad, sums, kind, step, zero, fixed, q_min, q_max, rows, columns, count, steps, inner,
             BY: tl.constexpr, LEARNED: tl.constexpr, IN_PLACE: tl.constexpr, ROWS: tl.constexpr,
             COLUMNS: tl.constexpr):  # fmt: skip
    """(M4), (M10) Compute the gradient of x, and the tiles' sums for step and, ``kind`` further, LEARNED offset."""
    r, c, at, there = _tile(rows, columns, count, ROWS, COLUMNS)
    s, z = _grid(step, zero, fixed, r, c, rows, columns, steps, inner, BY)
    v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    g = tl.load(up + at, mask=there, other=0.0).to(tl.float32)
    if IN_PLACE:
        tl.debug_barrier()  # threads of a small tile may hold the same element
    vs = tl.where(tl.abs(v) < float("inf"), tl.math.div_rn(v, s), float("nan"))
    low, high = q_min - z, q_max - z
    inside = (vs > low) & (vs < high)
    outer = tl.where(vs <= low, q_min if LEARNED else low, q_max if LEARNED else high)
    terms = tl.where(inside | (vs != vs), _rounded(vs) - vs, outer)
    _store(grad + at, tl.where(inside, g, 0.0), there)
    _sum(sums, tl.where(there, terms * g, 0.0), r, c, rows, columns, BY, COLUMNS)
    if LEARNED:
        _sum(sums + kind, tl.where(inside, 0.0, g), r, c, rows, columns, BY, COLUMNS)


@triton.jit
def finish(sums, more, bad, scale, bias, y, rows, columns, count, steps, inner,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Compute ``fl(fl(float32(sums + more) * scale) + bias)``; bad: 0 or NaN, by row; the others by column."""
    r, c, at, there = _tile(rows, columns, count, ROWS, COLUMNS)
    acc = tl.load(sums + at, mask=there, other=0)
    if more is not None:
        acc += tl.load(more + c, mask=c < columns, other=0)
    v = (acc.to(tl.float32) + tl.load(bad + r, mask=r < rows)) * tl.load(scale + c, mask=c < columns)
    if bias is not None:
        v += tl.load(bias + c, mask=c < columns).to(tl.float32)
    tl.store(y + at, v, mask=there)


INTERPRETED = not isinstance(forward, triton.JITFunction)
